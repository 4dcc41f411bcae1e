/**
 * The chart, by helm itself, against the API's own schemas: Kubernetes' OpenAPI document, and the CRDs of KEDA and of
 * the Prometheus operator, strictly. Then what no schema says: that the parts fit each other and the services.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, globSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { describe, test } from 'node:test';
import { parseEnv } from 'node:util';
import { parse, parseAllDocuments } from 'yaml';
import { loadBundle } from '../packages/shared/src/bundle.ts';
import { queueName } from '../packages/shared/src/pipeline.ts';
import { madeFiles, render, renderings, toolsDirectory } from './render.ts';

const root = path.dirname(import.meta.dirname);
const read = (file: string) => readFileSync(path.join(root, file), 'utf8');

const missing = ['bin/helm', 'bin/kubeconform', 'schemas/deployment-apps-v1.json'].filter(
  (name) => !existsSync(path.join(toolsDirectory, name)),
);
const skip = missing.length > 0 && `${missing.join(', ')} not here: deploy/tools.sh makes them`;

interface Container {
  name: string;
  image: string;
  env?: { name: string; value: string }[];
  ports?: { name: string; containerPort: number }[];
  securityContext: Record<string, unknown> & { seccompProfile?: { type: string; localhostProfile: string } };
  volumeMounts: { name: string; mountPath: string; readOnly?: boolean }[];
  resources: { requests: Record<string, string>; limits: Record<string, string> };
}
interface Selector {
  matchLabels: Record<string, string>;
  matchExpressions?: { key: string; operator: string; values: string[] }[];
}
interface Manifest {
  kind: string;
  apiVersion: string;
  metadata: { name: string; namespace: string; labels: Record<string, string> };
  // biome-ignore lint/suspicious/noExplicitAny: the schema is checked by kubeconform, above all else
  spec: any;
  data?: Record<string, string>;
}

const manifestsOf = (text: string) =>
  parseAllDocuments(text)
    .map((document) => document.toJS() as Manifest | null)
    .filter((manifest) => manifest !== null);
const kept = (name: string) => read(`deploy/kubernetes/${name}.yaml`);
const all = Object.fromEntries(Object.keys(renderings).map((name) => [name, manifestsOf(kept(name))]));
const of = (name: string, kind: string) => all[name]!.filter((manifest) => manifest.kind === kind);
const deployments = (name: string) => of(name, 'Deployment');
const podOf = (deployment: Manifest) =>
  deployment.spec.template.spec as {
    containers: [Container];
    initContainers?: Container[];
    volumes: { name: string; secret?: { secretName: string } }[];
    nodeSelector?: Record<string, string>;
    tolerations?: unknown[];
    terminationGracePeriodSeconds: number;
    securityContext: Record<string, unknown>;
  };
const labelsOf = (deployment: Manifest) => deployment.spec.template.metadata.labels as Record<string, string>;
const componentOf = (deployment: Manifest) => labelsOf(deployment)['app.kubernetes.io/component']!;
const envOf = (container: Container) =>
  Object.fromEntries((container.env ?? []).map(({ name, value }) => [name, value]));

function selects({ matchLabels, matchExpressions = [] }: Selector, labels: Record<string, string>): boolean {
  return (
    Object.entries(matchLabels).every(([key, value]) => labels[key] === value) &&
    matchExpressions.every(({ key, operator, values }) => {
      assert.equal(operator, 'In');
      return values.includes(labels[key]!);
    })
  );
}

const oneModel = (change: object) => {
  const [model] = (parse(read('deploy/helm/acousticsense/values.yaml')) as { models: object[] }).models;
  return ['--set-json', `models=${JSON.stringify([{ ...model, ...change }])}`];
};

function conform(text: string): { valid: boolean; words: string } {
  const { status, stdout, stderr } = spawnSync(
    path.join(toolsDirectory, 'bin/kubeconform'),
    [
      ...['-strict', '-summary', '-schema-location'],
      path.join(toolsDirectory, 'schemas/{{ .ResourceKind }}{{ .KindSuffix }}.json'),
    ],
    { input: text, encoding: 'utf8' },
  );
  return { valid: status === 0, words: `${stdout}${stderr}` };
}

describe('the chart, rendered', () => {
  for (const name of Object.keys(renderings)) {
    test(`is what lies in deploy/kubernetes/${name}.yaml (else: node deploy/render.ts)`, { skip }, () => {
      assert.ok(render(name) === kept(name));
    });

    test(`${name}: every manifest is valid by the API's own schema, strictly`, { skip }, () => {
      const { valid, words } = conform(kept(name));
      assert.ok(valid, words);
      const count = manifestsOf(kept(name)).length;
      assert.match(words, new RegExp(`Valid: ${count}, Invalid: 0, Errors: 0, Skipped: 0`));
    });
  }

  for (const [what, from, to] of [
    ['a field of a container that does not exist', 'readOnlyRootFilesystem:', 'readonlyRootFilesystem:'],
    ['a field of a KEDA trigger that does not exist', 'metricType: AverageValue', 'metricTyp: AverageValue'],
    ['a field of a ServiceMonitor that does not exist', 'honorLabels: true', 'honourLabels: true'],
    ['a probe without its port', 'httpGet: { path: /healthz, port: 9100 }', 'httpGet: { path: /healthz }'],
    ['a number that is none', 'terminationGracePeriodSeconds: 35', 'terminationGracePeriodSeconds: "35s"'],
  ] as const)
    test(`the schemas refuse ${what}`, { skip }, () => {
      const text = kept('default');
      assert.ok(text.includes(from));
      assert.equal(conform(text.replace(from, to)).valid, false);
    });

  for (const [what, more, sentence] of [
    [
      'a value with another name',
      ['--set', 'decoder.replica=3'],
      /additional properties 'replica' not allowed/,
    ],
    ['autoscaling down to nothing', ['--set', 'decoder.autoscaling.minReplicas=0'], /minimum: got 0, want 1/],
    ['a digest that is none', oneModel({ digest: 'abc' }), /'abc' does not match pattern/],
    ['a directory as storage', ['--set', 'storage.url=file:///data'], /'file:[^']*' does not match pattern/],
    ['no model that serves', oneModel({ state: 'candidate' }), /exactly one must have state serving, not 0/],
    [
      'two autoscalers for one queue',
      ['--set', 'inference.variants.gpu.enabled=true'],
      /more than one of them has autoscaling/,
    ],
  ] as const)
    test(`refuses ${what} with a sentence`, { skip }, () => {
      assert.throws(() => render('default', more), sentence);
    });

  test('takes a model as an OCI image, without any copy of it in the pod', { skip }, () => {
    const text = render(
      'default',
      oneModel({ source: { image: { reference: 'registry.example.com/models:2', path: 'genres' } } }),
    );
    const { valid, words } = conform(text);
    assert.ok(valid, words);
    const decoder = manifestsOf(text).find(
      ({ kind, metadata }) => kind === 'Deployment' && /-decoder-/.test(metadata.name),
    )!;
    assert.equal(envOf(podOf(decoder).containers[0])['MODEL_URL'], '/models/genres');
  });
});

describe('the manifests', () => {
  test("the chart's copies of rules and dashboard are those of deploy (else: node deploy/render.ts)", () => {
    const made = madeFiles();
    for (const [file, text] of Object.entries(made)) assert.ok(read(`deploy/${file}`) === text, file);
    assert.deepEqual(
      globSync('helm/acousticsense/files/rules/*', { cwd: import.meta.dirname }).sort(),
      Object.keys(made)
        .filter((file) => file.includes('files/rules'))
        .sort(),
    );
    const rules = of('default', 'PrometheusRule').flatMap(({ spec }) => spec.groups);
    const written = globSync('deploy/prometheus/rules/*.yml', { cwd: root })
      .sort()
      .flatMap((file) => parse(read(file)).groups);
    assert.deepEqual(rules, written);
  });

  test('no container runs as root, writes to its root, or has a capability', () => {
    for (const name of Object.keys(renderings))
      for (const deployment of deployments(name)) {
        const pod = podOf(deployment);
        assert.deepEqual(
          [
            pod.securityContext['runAsNonRoot'],
            pod.securityContext['runAsUser'],
            pod.securityContext['seccompProfile'],
          ],
          [true, 10001, { type: 'RuntimeDefault' }],
        );
        for (const container of [...pod.containers, ...(pod.initContainers ?? [])]) {
          const { seccompProfile, ...security } = container.securityContext;
          assert.deepEqual(security, {
            allowPrivilegeEscalation: false,
            readOnlyRootFilesystem: true,
            capabilities: { drop: ['ALL'] },
          });
          assert.ok(
            container.resources.limits['memory'],
            `${deployment.metadata.name} has a limit of memory`,
          );
          assert.ok(container.volumeMounts.length > 0);
          if (seccompProfile) assert.equal(componentOf(deployment), 'decoder');
        }
      }
  });

  test('every variable is one that the services read, and none holds a secret', () => {
    const known = new Set(Object.keys(parseEnv(read('.env.example'))));
    for (const name of Object.keys(renderings))
      for (const deployment of deployments(name))
        for (const variable of Object.keys(envOf(podOf(deployment).containers[0]))) {
          assert.ok(known.has(variable), `${deployment.metadata.name}: ${variable}`);
          assert.ok(!/KEY|SECRET|REDIS_URL|^AWS_/.test(variable), variable);
        }
  });

  test("every variable and its value is taken by the service's own configuration", async () => {
    const given = {
      REDIS_URL: 'redis://redis:6379',
      API_KEY: 'k'.repeat(32),
      SECRETS_KEY: Buffer.alloc(32).toString('base64'),
    };
    for (const deployment of [...deployments('default'), ...deployments('gpu')]) {
      const { loadConfig } = (await import(
        path.join(root, `services/${componentOf(deployment)}/src/config.ts`)
      )) as {
        loadConfig(env: object): { metricsPort?: number; port?: number; drainSeconds: number };
      };
      const container = podOf(deployment).containers[0];
      const config = loadConfig({ ...given, ...envOf(container) });
      assert.equal(config.metricsPort ?? config.port, container.ports![0]!.containerPort);
      // Giving back what runs takes up to 5 s more, preStop another 5.
      assert.ok(podOf(deployment).terminationGracePeriodSeconds >= config.drainSeconds + 10);
    }
  });

  test('who needs a secret has it, and nobody else: the key of the API, and the one that opens credentials', () => {
    const holders = (secret: string) =>
      deployments('default')
        .filter((deployment) =>
          podOf(deployment).volumes.some((volume) => volume.secret?.secretName === secret),
        )
        .map(componentOf)
        .sort();
    const everybody = ['api', 'decoder', 'feeder', 'fetch', 'inference', 'webhook'];
    assert.deepEqual(holders('acousticsense-redis'), everybody);
    assert.deepEqual(holders('acousticsense-storage'), everybody);
    assert.deepEqual(holders('acousticsense-api'), ['api']);
    assert.deepEqual(holders('acousticsense-sealing'), ['api', 'decoder', 'feeder', 'webhook']);
  });

  test('only fetch and webhook leave the cluster, for public addresses; sources are for those that read them', () => {
    for (const name of Object.keys(renderings)) {
      const policies = of(name, 'NetworkPolicy').map(({ spec }) => spec);
      for (const deployment of deployments(name)) {
        const labels = labelsOf(deployment);
        const mine = policies.filter(({ podSelector }) => selects(podSelector, labels));
        const component = componentOf(deployment);
        assert.ok(
          mine.some(({ policyTypes }) => policyTypes.includes('Egress') && policyTypes.includes('Ingress')),
          `${deployment.metadata.name} is closed by a policy`,
        );
        const blocks: { cidr: string; except?: string[] }[] = mine
          .flatMap(({ egress = [] }) => egress)
          .flatMap(({ to }: { to: { ipBlock?: { cidr: string; except?: string[] } }[] }) => {
            assert.ok(to.length > 0, 'a rule without "to" would open everything');
            return to.flatMap(({ ipBlock }) => ipBlock ?? []);
          });
        const everywhere = blocks.filter(({ cidr }) => /\/[0-3]$/.test(cidr));
        assert.equal(everywhere.length > 0, ['fetch', 'webhook'].includes(component), component);
        for (const { cidr, except = [] } of everywhere.filter(({ cidr }) => !cidr.includes(':')))
          for (const closed of ['10.0.0.0/8', '172.16.0.0/12', '192.168.0.0/16', '169.254.0.0/16'])
            assert.ok(except.includes(closed), `${cidr} without ${closed}`);
        const sources = blocks.some(({ cidr }) => cidr === '10.20.0.0/24');
        assert.equal(sources, name === 'gpu' && ['api', 'decoder', 'feeder'].includes(component));
        const ports = mine.flatMap(({ egress = [] }) => egress).flatMap((rule) => rule.ports);
        for (const port of [53, 6379, 8333])
          assert.ok(ports.some((rule: { port: number }) => rule.port === port));
      }
    }
  });

  test('every selector finds pods: services, monitors, budgets, policies; and every Deployment has a budget', () => {
    for (const name of Object.keys(renderings)) {
      const pods = deployments(name).map(labelsOf);
      const found = (selector: Selector) => pods.filter((labels) => selects(selector, labels));
      for (const { metadata, spec } of of(name, 'Service'))
        assert.ok(found({ matchLabels: spec.selector }).length > 0, metadata.name);
      for (const { metadata, spec } of of(name, 'NetworkPolicy'))
        assert.ok(found(spec.podSelector).length > 0, metadata.name);
      const budgets = of(name, 'PodDisruptionBudget');
      for (const { metadata, spec } of budgets) assert.ok(found(spec.selector).length > 0, metadata.name);
      for (const labels of pods)
        assert.equal(budgets.filter(({ spec }) => selects(spec.selector, labels)).length, 1);
      for (const monitor of of(name, 'ServiceMonitor')) {
        const [service, ...more] = of(name, 'Service').filter(({ metadata }) =>
          selects(monitor.spec.selector, metadata.labels),
        );
        assert.ok(service && more.length === 0, monitor.metadata.name);
        const [endpoint] = monitor.spec.endpoints;
        assert.ok(service.spec.ports.some((port: { name: string }) => port.name === endpoint.port));
        assert.equal(endpoint.honorLabels, true);
      }
      const scraped = of(name, 'Service').flatMap(({ spec }) => found({ matchLabels: spec.selector }));
      assert.equal(new Set(scraped).size, pods.length, 'every pod is scraped');
    }
  });

  test('an autoscaler names a Deployment, which leaves its number of replicas to it, and the queue of its workers', () => {
    for (const name of Object.keys(renderings)) {
      const scaled = of(name, 'ScaledObject');
      for (const { metadata, spec } of scaled) {
        const target = deployments(name).find(
          (deployment) => deployment.metadata.name === spec.scaleTargetRef.name,
        );
        assert.ok(target, metadata.name);
        assert.equal(target.spec.replicas, undefined);
        const queue = labelsOf(target)['acousticsense.io/queue'] ?? 'fetch';
        const [{ metadata: trigger }] = spec.triggers;
        assert.ok(trigger.query.includes(`queue="${queue}"`), trigger.query);
        assert.ok(Number(trigger.threshold) > 0);
        assert.ok(spec.minReplicaCount >= 1);
      }
      for (const deployment of deployments(name).filter(({ spec }) => spec.replicas === undefined))
        assert.equal(
          scaled.filter(({ spec }) => spec.scaleTargetRef.name === deployment.metadata.name).length,
          1,
        );
    }
  });

  test('the default values name the bundle that is in the images, and its queues', async () => {
    const bundle = await loadBundle(path.join(root, 'models/default'), { verifyFiles: false });
    const route = { profileHash: bundle.profileHash, modelDigest: bundle.digest };
    const queues = deployments('default').map((deployment) => labelsOf(deployment)['acousticsense.io/queue']);
    assert.ok(queues.includes(queueName('decode', route)));
    assert.ok(queues.includes(queueName('inference', route)));
  });

  test('a GPU pod has one GPU, for one child of the service, on a node that has some, and does without none', () => {
    const [gpu, ...more] = deployments('gpu').filter((deployment) => componentOf(deployment) === 'inference');
    assert.ok(gpu && more.length === 0);
    const pod = podOf(gpu);
    assert.equal(pod.containers.length, 1);
    assert.equal(pod.containers[0].resources.limits['nvidia.com/gpu'], '1');
    assert.equal(envOf(pod.containers[0])['REQUIRE_GPU'], '1');
    assert.deepEqual(pod.nodeSelector, {
      'nvidia.com/gpu.present': 'true',
      'node.kubernetes.io/instance-type': 'g6.2xlarge',
    });
    assert.deepEqual(pod.tolerations, [{ key: 'nvidia.com/gpu', operator: 'Exists', effect: 'NoSchedule' }]);
  });

  test('in a roll-out each model has its own workers under its digest, and one alone is the default', () => {
    const inference = deployments('two-models').filter(
      (deployment) => componentOf(deployment) === 'inference',
    );
    const facts = inference.map((deployment) => {
      const env = envOf(podOf(deployment).containers[0]);
      const [init] = podOf(deployment).initContainers!;
      return {
        variant: labelsOf(deployment)['acousticsense.io/variant'],
        candidate: env['MODEL_CANDIDATE'],
        url: env['MODEL_URL'],
        queue: labelsOf(deployment)['acousticsense.io/queue'],
        checks: `inference-${envOf(init!)['MODEL_DIGEST']!.slice(0, 16)}`,
        named: deployment.metadata.name.slice(-8),
      };
    });
    assert.deepEqual(
      facts.map(({ variant, candidate, url }) => [variant, candidate, url]),
      [
        ['gpu', '0', '/models/2f7d3c5e8a1b4c6d'],
        ['cpu', '1', '/app/models/default'],
        ['cpu', '1', '/models/house-3'],
      ],
    );
    for (const { queue, checks, named } of facts) {
      assert.equal(queue, checks);
      assert.ok(queue!.startsWith(`inference-${named}`));
    }
    // Two models of one profile share their decoders.
    const decoders = deployments('two-models').filter((deployment) => componentOf(deployment) === 'decoder');
    assert.deepEqual(decoders.map((deployment) => labelsOf(deployment)['acousticsense.io/queue']).sort(), [
      'decode-0f1a2b3c4d5e6f70',
      'decode-d17dd67797f7dbe2',
    ]);
  });

  test("the decoder's own system calls: none to look into others, to get out of its namespaces, to load or trace", () => {
    interface Rule {
      names: string[];
      action: string;
      args?: { index: number; value: number; op: string }[];
    }
    const profile = JSON.parse(read('deploy/helm/acousticsense/files/seccomp-decoder.json')) as {
      defaultAction: string;
      syscalls: Rule[];
    };
    assert.equal(profile.defaultAction, 'SCMP_ACT_ERRNO');
    const allowed = profile.syscalls.filter(({ action }) => action === 'SCMP_ACT_ALLOW');
    const freely = new Set(allowed.filter(({ args }) => !args).flatMap(({ names }) => names));
    const never =
      'add_key bpf clone clone3 finit_module init_module io_uring_enter io_uring_setup kcmp kexec_load keyctl mknod mknodat mount ' +
      'move_mount open_by_handle_at open_tree perf_event_open pivot_root process_vm_readv process_vm_writev ptrace reboot ' +
      'request_key setgid setns setuid socket swapon umount2 unshare userfaultfd';
    assert.deepEqual(
      never.split(' ').filter((name) => freely.has(name)),
      [],
    );
    const families = allowed.flatMap(({ names, args }) =>
      names.includes('socket') ? args!.map(({ value }) => value) : [],
    );
    assert.deepEqual(families, [1, 2, 10, 16], 'AF_UNIX, AF_INET, AF_INET6, AF_NETLINK');
    assert.equal(
      podOf(of('gpu', 'Deployment').find((one) => componentOf(one) === 'decoder')!).containers[0]
        .securityContext.seccompProfile?.type,
      'Localhost',
    );
  });

  test('the program that fetches models is in the ConfigMap as it lies in the chart', () => {
    const script = read('deploy/helm/acousticsense/files/fetch-model.mjs');
    const map = of('default', 'ConfigMap').find(({ data }) => data?.['fetch-model.mjs'])!;
    assert.equal(map.data!['fetch-model.mjs'], script);
    const hash = createHash('sha256').update(script).digest('hex').slice(0, 16);
    for (const deployment of deployments('default').filter((one) => podOf(one).initContainers))
      assert.equal(
        deployment.spec.template.metadata.annotations['acousticsense.io/files'],
        hash,
        'a change restarts',
      );
  });
});

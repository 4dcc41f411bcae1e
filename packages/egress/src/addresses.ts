/** Which IP addresses are public, and which are never to be reached: judged on the address itself, not its text. */
import ipaddr from 'ipaddr.js';

export type Address = ipaddr.IPv4 | ipaddr.IPv6;
export type Network = readonly [Address, number];

const network = (cidr: string): Network => ipaddr.parseCIDR(cidr);

/**
 * Where clouds answer an instance about itself, credentials included. Link-local as a whole, since every cloud
 * has its service there and nothing that is fetched lives there: AWS, GCP, Azure, OCI, DigitalOcean at
 * 169.254.169.254, ECS and EKS at 169.254.170.x, Tencent at 169.254.0.23, OpenStack at fe80::a9fe:a9fe.
 */
const metadataNetworks = [
  '169.254.0.0/16',
  'fe80::/10',
  // AWS's own services inside a VPC: metadata ::254, pod identity ::23, DNS, time.
  'fd00:ec2::/32',
  // GCP, Scaleway.
  'fd20:ce::254/128',
  'fd00:42::42/128',
  // Alibaba; Azure's WireServer; OCI before 169.254.
  '100.100.100.200/32',
  '168.63.129.16/32',
  '192.0.0.192/32',
].map(network);

const metadataNames = [
  'metadata',
  'metadata.google.internal',
  'metadata.goog',
  'instance-data',
  'instance-data.ec2.internal',
  'metadata.azure.internal',
  'metadata.tencentyun.com',
  'metadata.packet.net',
  'metadata.platformequinix.com',
  'api.metadata.cloud.ibm.com',
  'rancher-metadata',
];

/** RFC 4291: all of the global unicast space that has been handed out. */
const globalUnicast = network('2000::/3');
/** RFC 6052: on an IPv6-only network every IPv4 host is reached under it, so it is as public as what it embeds. */
const wellKnownNat64 = network('64:ff9b::/96');

export function isInside([base, bits]: Network, address: Address): boolean {
  return base.kind() === address.kind() && address.match(base, bits);
}

/** @returns undefined for text that is no plain IP address: no octal, hexadecimal or shortened IPv4. */
export function parseAddress(text: string): Address | undefined {
  return ipaddr.IPv4.isValidFourPartDecimal(text) || ipaddr.IPv6.isValid(text)
    ? ipaddr.parse(text)
    : undefined;
}

/** @returns the network of `10.0.0.0/8`, `fd00::/8`, or of one address. */
export function parseNetwork(text: string): Network | undefined {
  const address = parseAddress(text);
  if (address !== undefined) return [address, address.kind() === 'ipv4' ? 32 : 128];
  return ipaddr.isValidCIDR(text) && parseAddress(text.split('/')[0]!) !== undefined
    ? network(text)
    : undefined;
}

/** What is not plain public unicast has the name of its range here (`loopback`, `private`, ...). */
export function whyNotPublic(address: Address): string | undefined {
  if (address.kind() === 'ipv4') {
    const range = address.range();
    return range === 'unicast' ? undefined : range;
  }
  const v6 = address as ipaddr.IPv6;
  if (isInside(wellKnownNat64, v6)) {
    const inner = whyNotPublic(v4At(v6, 12));
    return inner && `NAT64 of ${inner}`;
  }
  const range = v6.range();
  if (range !== 'unicast') return range;
  if (isIsatap(v6)) return 'isatap';
  return isInside(globalUnicast, v6) ? undefined : 'reserved';
}

/** Metadata services, in every spelling that a gateway or the kernel may turn into a connection to one. */
export function isMetadataAddress(address: Address): boolean {
  const faces = address.kind() === 'ipv4' ? [address] : [address, ...embedded(address as ipaddr.IPv6)];
  return faces.some((face) => metadataNetworks.some((net) => isInside(net, face)));
}

/** @param name in lower case, without the final dot. */
export function isMetadataName(name: string): boolean {
  return metadataNames.some((known) => name === known || name.endsWith(`.${known}`));
}

const local = network('64:ff9b:1::/48');
const inLowBits = ['::/96', '::ffff:0:0/96', '::ffff:0:0:0/96', '64:ff9b::/96'].map(network);
const sixToFour = network('2002::/16');
const teredo = network('2001::/32');

/** Every IPv4 address that an IPv6 one may carry. */
function embedded(address: ipaddr.IPv6): ipaddr.IPv4[] {
  if (inLowBits.some((net) => isInside(net, address)) || isIsatap(address)) return [v4At(address, 12)];
  if (isInside(sixToFour, address)) return [v4At(address, 2)];
  // RFC 4380: the server in clear, the client with its bits turned over.
  if (isInside(teredo, address)) return [v4At(address, 4), v4At(address, 12, 0xff)];
  // RFC 8215: prefixes of the operator's length; RFC 6052 then leaves out the byte at bit 64.
  if (isInside(local, address)) {
    const bytes = address.toByteArray();
    const layouts = [
      [6, 7, 9, 10],
      [7, 9, 10, 11],
      [9, 10, 11, 12],
      [12, 13, 14, 15],
    ];
    return layouts.map((places) => new ipaddr.IPv4(places.map((place) => bytes[place]!)));
  }
  return [];
}

/** RFC 5214: an interface identifier that carries an IPv4 address under any prefix. */
function isIsatap({ parts }: ipaddr.IPv6): boolean {
  return (parts[4]! & 0xfdff) === 0 && parts[5] === 0x5efe;
}

function v4At(address: ipaddr.IPv6, byte: number, flip = 0): ipaddr.IPv4 {
  return new ipaddr.IPv4(
    address
      .toByteArray()
      .slice(byte, byte + 4)
      .map((octet) => octet ^ flip),
  );
}

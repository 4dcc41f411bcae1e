/** Multipart uploads, streamed into object storage: a file is never held in memory. */
import { createHash } from 'node:crypto';
import type { IncomingMessage } from 'node:http';
import { type Readable, Transform } from 'node:stream';
import { ProblemError } from '@acousticsense/shared/errors';
import type { Storage } from '@acousticsense/shared/storage';
import { Busboy, type BusboyHeaders } from '@fastify/busboy';

export interface Upload {
  readonly size: number;
  readonly sha256: string;
  /** What the caller called it, for display only: no path, no control characters, at most 255 characters. */
  readonly filename: string;
  readonly fields: Readonly<Record<string, string>>;
}

export interface UploadTarget {
  readonly storage: Pick<Storage, 'put' | 'delete'>;
  readonly key: string;
  /** The form field that holds the file. */
  readonly field: string;
  readonly maxBytes: number;
}

/** Bytes that fields and boundaries may add to the file's own size. */
export const formOverhead = 64 * 1024;
const maxFields = 20;

/**
 * Reads the whole request. When it throws, nothing is stored under `target.key`.
 *
 * @throws {ProblemError} wrong_content_type, no_file, too_many_files, file_too_large, empty_file, upload_cut, bad_request
 */
export async function receiveUpload(request: IncomingMessage, target: UploadTarget): Promise<Upload> {
  const contentType = request.headers['content-type'] ?? '';
  if (!/^multipart\/form-data\s*;.*boundary=/i.test(contentType)) {
    throw new ProblemError(
      'wrong_content_type',
      `Send the audio as multipart/form-data in the field "${target.field}"; this request has the content type "${contentType.slice(0, 100)}".`,
    );
  }
  if (Number(request.headers['content-length'] ?? 0) > target.maxBytes + formOverhead)
    throw tooLarge(target.maxBytes);

  // Its 'close' has been and gone: nothing below would ever hear of it.
  if (request.destroyed && !request.complete) throw uploadCut();

  const stop = new AbortController();
  // Without a prototype, so that a field named `__proto__` is a field like any other.
  const fields: Record<string, string> = Object.create(null);
  let stored: Promise<Omit<Upload, 'fields'>> | undefined;
  let problem: Error | undefined;

  const form = openForm(request, target.maxBytes);
  const fail = (error: Error) => {
    problem ??= error;
    stop.abort(problem);
    form.destroy();
  };
  form.on('field', (name, value) => {
    fields[name] = value;
  });
  const tooManyFields = () =>
    fail(new ProblemError('bad_request', `The form holds more than ${maxFields} fields.`));
  form.on('fieldsLimit', tooManyFields);
  form.on('partsLimit', tooManyFields);
  // A part may have no name, whatever the parser's types say.
  form.on('file', (name: string | undefined = '', stream, filename) => {
    if (name !== target.field) {
      stream.resume();
      return fail(
        new ProblemError(
          'no_file',
          `The file came in the field "${name.slice(0, 50)}"; send it in "${target.field}".`,
          { field: name },
        ),
      );
    }
    if (stored) {
      stream.resume();
      return fail(
        new ProblemError('too_many_files', 'Send one file at a time: this request holds two.', {
          field: name,
        }),
      );
    }
    stream.on('limit', () => fail(tooLarge(target.maxBytes)));
    stored = store(stream, filename, target, stop.signal);
    stored.catch(fail);
  });

  try {
    await new Promise<void>((resolve, reject) => {
      form.on('finish', resolve);
      form.on('error', (error) => reject(problem ?? brokenForm(error as Error)));
      form.on('close', () => problem && reject(problem));
      request.on('error', () => reject(uploadCut()));
      request.on('close', () => !request.complete && reject(uploadCut()));
      request.pipe(form);
    });
    if (problem) throw problem;
    if (!stored)
      throw new ProblemError('no_file', `Send one audio file in the field "${target.field}".`, {
        field: target.field,
      });
    const upload = await stored;
    if (upload.size === 0) throw new ProblemError('empty_file', 'The file is empty: it holds no bytes.');
    return { ...upload, fields };
  } catch (error) {
    // Before the abort, which makes the storing fail too: what came first is the reason.
    problem ??= error as Error;
    request.unpipe(form);
    stop.abort(problem);
    await stored?.catch(() => {});
    await target.storage.delete(target.key).catch(() => {});
    throw problem;
  }
}

/** @throws {ProblemError} wrong_content_type: no boundary that can be used. */
function openForm(request: IncomingMessage, maxBytes: number): InstanceType<typeof Busboy> {
  try {
    return new Busboy({
      headers: request.headers as BusboyHeaders,
      limits: {
        files: 2,
        fileSize: maxBytes,
        fields: maxFields,
        fieldSize: 1_000,
        fieldNameSize: 100,
        parts: maxFields + 5,
      },
    });
  } catch (error) {
    throw new ProblemError(
      'wrong_content_type',
      `The content type of the form cannot be used: ${(error as Error).message}.`,
      {},
      error,
    );
  }
}

async function store(
  stream: Readable,
  filename: string,
  target: UploadTarget,
  signal: AbortSignal,
): Promise<Omit<Upload, 'fields'>> {
  const hash = createHash('sha256');
  let size = 0;
  const measured = new Transform({
    transform(chunk: Buffer, _encoding, done) {
      hash.update(chunk);
      size += chunk.length;
      done(null, chunk);
    },
  });
  stream.on('error', (error) => measured.destroy(brokenForm(error)));
  stream.pipe(measured);
  await target.storage.put(target.key, measured, signal);
  return { size, sha256: hash.digest('hex'), filename: displayName(filename) };
}

/** For display only; no file is ever named after it. */
export function displayName(filename: string | undefined): string {
  const last = (filename ?? '').split(/[/\\]/).at(-1) ?? '';
  // Well-formed: half a surrogate pair (a name sent as UTF-16) could not be written into a header.
  const clean = [
    ...last
      .toWellFormed()
      .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, ' ')
      .trim(),
  ]
    .slice(0, 255)
    .join('');
  return clean === '' || clean === '.' || clean === '..' ? 'unnamed' : clean;
}

export function tooLarge(maxBytes: number): ProblemError {
  const mebibytes = Math.floor(maxBytes / (1024 * 1024));
  const limit = mebibytes >= 1 ? `${mebibytes} MiB` : `${maxBytes} bytes`;
  return new ProblemError('file_too_large', `The file is larger than ${limit}, the most that is taken here.`);
}

function brokenForm(error: Error): ProblemError {
  return new ProblemError('bad_request', `The form could not be read: ${error.message}.`, {}, error);
}

function uploadCut(): ProblemError {
  return new ProblemError(
    'upload_cut',
    'The connection ended before the upload was complete; send it again.',
  );
}

/** What every route refuses alike. */
import { ProblemError } from '@acousticsense/shared/errors';
import type { Request, Response } from 'express';

/**
 * The body that `express.json` has read.
 * @param what is to be sent: `the source`.
 * @throws {ProblemError} wrong_content_type
 */
export function jsonBodyOf(request: Request, what: string): unknown {
  if (request.is('application/json')) return request.body;
  throw new ProblemError('wrong_content_type', `Send ${what} as JSON, with content-type application/json.`);
}

/** For every other method of a path. @param allowed `GET, HEAD` */
export function refuseMethod(allowed: string) {
  return (request: Request, response: Response): never => {
    response.set('allow', allowed);
    throw new ProblemError(
      'method_not_allowed',
      `${request.method} is not served at ${request.path}; see /openapi.json.`,
    );
  };
}

/** The part of s3rver's interface that the tests use; the package ships no types. */
declare module 's3rver' {
  export default class S3rver {
    constructor(options: {
      port: number;
      address: string;
      silent: boolean;
      directory: string;
      configureBuckets: { name: string; configs: string[] }[];
    });
    /** Koa's: run in order before the answer. */
    readonly middleware: unknown[];
    readonly store: {
      getResourcePath(bucket: string, key: string | undefined, resource: string): string;
      deleteObject(bucket: string, key: string): Promise<void>;
      getMetadata(bucket: string, key: string): Promise<Record<string, string>>;
      getBucket(bucket: string): Promise<unknown>;
      listObjects(
        bucket: string,
        options: { prefix: string; startAfter: string | undefined; maxKeys: number },
      ): Promise<{
        objects: {
          key: string;
          size: number;
          metadata: Record<string, string>;
          lastModifiedDate: Date;
        }[];
        isTruncated: boolean;
      }>;
      putObjectMultipart(
        bucket: string,
        uploadId: string,
        parts: readonly { number: number; etag: string }[],
      ): Promise<{ md5: string; size: number }>;
    };
    readonly httpServer: import('node:http').Server;
    run(): Promise<{ address: string; port: number }>;
    close(): Promise<void>;
  }
}

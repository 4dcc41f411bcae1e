import assert from 'node:assert/strict';
import { test } from 'node:test';
import { npyHeader, parseNpy } from './tensor.ts';

/** What NumPy 2 writes for `np.save(f, np.arange(6, dtype=np.uint8).reshape(2, 3))`. */
const fromNumpy = Buffer.concat([
  Buffer.from([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, 0x76, 0]),
  Buffer.from(`{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }`.padEnd(0x75, ' '), 'latin1'),
  Buffer.from('\n\x00\x01\x02\x03\x04\x05', 'latin1'),
]);

test('an array that NumPy wrote is read with its shape and values', () => {
  const { shape, data } = parseNpy(fromNumpy);
  assert.deepEqual(shape, [2, 3]);
  assert.deepEqual([...data], [0, 1, 2, 3, 4, 5]);
});

test('a header is byte for byte what NumPy writes', () => {
  assert.ok(npyHeader([2, 3]).equals(fromNumpy.subarray(0, -6)));
});

test('arrays of any shape read back, and their data begins at a multiple of 64 bytes', () => {
  for (const shape of [[1], [7], [3, 128, 128], [1_000_000, 128, 128].map((n) => n % 100), [2, 1, 1, 5]]) {
    const size = shape.reduce((a, b) => a * b, 1);
    const header = npyHeader(shape);
    assert.equal(header.length % 64, 0);
    assert.deepEqual(parseNpy(Buffer.concat([header, Buffer.alloc(size, 9)])).shape, shape);
  }
});

test('what is no uint8 array, or not whole, is refused', () => {
  const float = Buffer.from(fromNumpy);
  float.write("'<f4'", float.indexOf("'|u1'"), 'latin1');
  const fortran = Buffer.from(fromNumpy);
  fortran.write('True ', fortran.indexOf('False'), 'latin1');
  for (const bytes of [
    float,
    fortran,
    fromNumpy.subarray(0, -1),
    Buffer.concat([fromNumpy, Buffer.from('x')]),
    Buffer.from('RIFF....WAVE'),
    Buffer.alloc(0),
  ]) {
    assert.throws(() => parseNpy(bytes), TypeError);
  }
});

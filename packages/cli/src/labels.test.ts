import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createLabelMatcher } from './labels.ts';

const labels = ['Hip-Hop', 'R&B', 'Pop', '流行', 'Post-Punk', 'Post Punk'];

test('case and punctuation do not matter, in any script', () => {
  const match = createLabelMatcher(labels);
  for (const label of ['Hip-Hop', 'hiphop', 'HIP HOP', 'hip_hop']) assert.equal(match(label), 0, label);
  assert.equal(match('r & b'), 1);
  assert.equal(match('流行'), 3);
  assert.equal(match('rap'), undefined);
});

test('of two labels that differ in punctuation only, each is found by its own spelling', () => {
  const match = createLabelMatcher(labels);
  assert.equal(match('Post-Punk'), 4);
  assert.equal(match('Post Punk'), 5);
  assert.equal(match('postpunk'), 4);
});

test('an alias leads to a label, whatever its own case; one that leads nowhere is refused by name', () => {
  const match = createLabelMatcher(labels, { 'Rap Music': 'hip hop' });
  assert.equal(match('rap music'), 0);
  assert.throws(() => createLabelMatcher(labels, { soul: 'Soul' }), /"soul" leads to "Soul"/);
});

/**
 * Loaded into npm while it installs. npm leaves out, without a word, optional packages whose `engines` exclude the
 * Node that npm runs on; native parts of the build tools exclude Debian's Node 18. They will be run by the pinned
 * Node, so it is the pinned version that npm has to ask about.
 */
const { optionalDependencies } = require('../package.json');

Object.defineProperty(process, 'version', {
  value: `v${optionalDependencies[`node-linux-${process.arch}`]}`,
});

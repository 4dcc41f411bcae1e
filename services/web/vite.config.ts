import { defineConfig, type Plugin } from 'vite';

/** The words are filled in by the script: the first paint waits for it instead of showing empty headings. */
const paintWithWords: Plugin = {
  name: 'paint-with-words',
  transformIndexHtml: {
    order: 'post',
    handler: (html) => html.replace('<script type="module"', '<script blocking="render" type="module"'),
  },
};

export default defineConfig({
  plugins: [paintWithWords],
  build: {
    target: 'es2022',
    // The page is served under a policy without inline code: every asset is a file of its own, named by its hash.
    assetsInlineLimit: 0,
    modulePreload: false,
  },
  // `vite` alone serves the sources against an API that `npm start` brought up.
  server: { proxy: { '/v1': 'http://127.0.0.1:8000' } },
});

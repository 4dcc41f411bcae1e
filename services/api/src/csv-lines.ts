/** CSV as RFC 4180 has it, for programs and for spreadsheets, which take some texts for formulas. */

export type Cell = string | number | boolean | undefined;

/** Lines end with CR LF; a cell with a comma, semicolon, tab, quote or line break, or a space at an end, is quoted. */
export function csvLine(cells: readonly Cell[]): string {
  return `${cells.map(written).join(',')}\r\n`;
}

function written(cell: Cell): string {
  if (cell === undefined) return '';
  if (typeof cell !== 'string') return String(cell);
  const text = harmless(cell);
  // Semicolons and tabs: some spreadsheets split at these whatever the file's name says.
  return /[",;\t\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const formula = /^[=+\-@\t\r\n\uFF1D\uFF0B\uFF0D\uFF20]/;
const plainNumber = /^[+-]?\d+(\.\d+)?$/;

/**
 * A spreadsheet runs a cell that begins like a formula, and a ref or a key is whatever somebody wrote: such a text is
 * told with an apostrophe before it, which spreadsheets take for "this is text". Numbers stay as they are.
 * https://owasp.org/www-community/attacks/CSV_Injection
 */
function harmless(text: string): string {
  return formula.test(text) && !plainNumber.test(text) ? `'${text}` : text;
}

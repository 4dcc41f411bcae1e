/** The pictures of a report: SVG, and the same as PNG. Drawn for a white page, in colours that print. */
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { Resvg } from '@resvg/resvg-js';
import type { Report } from './evaluation.ts';
import type { Bin } from './metrics.ts';

const ink = '#1f2430';
const faint = '#8a8f9c';
const line = '#d9dce3';
const blue = [31, 94, 168] as const;
const family = 'DejaVu Sans';
const fonts = path.join(
  path.dirname(fileURLToPath(import.meta.resolve('dejavu-fonts-ttf/package.json'))),
  'ttf',
);

/** Twice the SVG's size, so that it is sharp on a dense screen. The font comes with the program: machines have none. */
export function toPng(svg: string): Buffer {
  const picture = new Resvg(svg, {
    fitTo: { mode: 'zoom', value: 2 },
    background: '#ffffff',
    font: {
      fontFiles: ['DejaVuSans.ttf', 'DejaVuSans-Bold.ttf'].map((file) => path.join(fonts, file)),
      // Labels may be in a script that DejaVu does not have.
      loadSystemFonts: true,
      defaultFontFamily: family,
    },
  });
  return picture.render().asPng();
}

/** Rows are the true genres, columns the answers; the darker, the larger the share of the row. */
export function confusionPicture({ matrix, model, accuracy }: Report): string {
  const { labels, counts } = matrix;
  const cell = 38;
  const margin = 20 + Math.max(...labels.map((label) => widthOf(label, 13)), 90);
  const top = 78 + Math.max(...labels.map((label) => widthOf(label, 13))) * Math.SQRT1_2;
  const side = labels.length * cell;
  const width = Math.max(margin + side + 60, margin + widthOf(title(model.name, model.version), 17), 360);
  const cells = counts.flatMap((row, truth) => {
    const all = row.reduce((a, b) => a + b, 0);
    return row.map((clips, answer) => {
      const share = all === 0 ? 0 : clips / all;
      const [x, y] = [margin + answer * cell, top + truth * cell];
      const box = `<rect x="${x}" y="${y}" width="${cell}" height="${cell}" fill="${shade(share)}" stroke="${line}"/>`;
      const colour = share > 0.5 ? '#ffffff' : ink;
      const weight = truth === answer ? ' font-weight="bold"' : '';
      return clips === 0
        ? box
        : `${box}<text x="${x + cell / 2}" y="${y + cell / 2 + 4.5}" text-anchor="middle" font-size="${clips > 999 ? 10 : 13}" fill="${colour}"${weight}>${clips}</text>`;
    });
  });
  const names = labels.flatMap((label, index) => {
    const along = index * cell + cell / 2;
    return [
      `<text x="${margin - 8}" y="${top + along + 4.5}" text-anchor="end" font-size="13">${escapeXml(label)}</text>`,
      `<text transform="translate(${margin + along + 3} ${top - 8}) rotate(-45)" font-size="13">${escapeXml(label)}</text>`,
    ];
  });
  const figures =
    accuracy === null
      ? ''
      : `${accuracy.clips} files: top-1 ${share(accuracy.top1)}, mean recall ${share(accuracy.meanRecall)}`;
  return svg(width, top + side + 46, [
    `<text x="20" y="32" font-size="17" font-weight="bold">${escapeXml(title(model.name, model.version))}</text>`,
    `<text x="20" y="53" font-size="13" fill="${faint}">${figures}</text>`,
    ...cells,
    ...names,
    `<text x="${margin}" y="${top + side + 26}" font-size="12" fill="${faint}">columns: answered; rows: true; colour: share of the row</text>`,
  ]);
}

/** The share of right answers over confidence; on the diagonal is where a calibrated model lies. */
export function reliabilityPicture(report: Report): string {
  const [left, top, side, below] = [64, 84, 360, 70];
  const bottom = top + side;
  const most = Math.max(1, ...report.reliability.map(({ clips }) => clips));
  const at = (value: number) => left + value * side;
  const up = (value: number) => bottom - value * side;
  const bars = report.reliability
    .filter(({ clips }) => clips > 0)
    .flatMap((bin) => [...reliabilityBar(bin, at, up), countBar(bin, at, bottom + 62 + below, most, below)]);
  const ticks = [0, 0.2, 0.4, 0.6, 0.8, 1].flatMap((tick) => [
    `<line x1="${left}" x2="${left + side}" y1="${up(tick)}" y2="${up(tick)}" stroke="${line}"/>`,
    `<text x="${left - 8}" y="${up(tick) + 4}" text-anchor="end" font-size="12" fill="${faint}">${tick * 100}</text>`,
    `<text x="${at(tick)}" y="${bottom + 18}" text-anchor="middle" font-size="12" fill="${faint}">${tick * 100}</text>`,
  ]);
  const { model, judged, calibrationError } = report;
  return svg(left + side + 40, bottom + 62 + below + 34, [
    `<text x="20" y="32" font-size="17" font-weight="bold">${escapeXml(title(model.name, model.version))}</text>`,
    `<text x="20" y="53" font-size="13" fill="${faint}">${judged} files: expected calibration error ${share(calibrationError ?? 0)}</text>`,
    ...ticks,
    ...bars,
    `<line x1="${at(0)}" y1="${up(0)}" x2="${at(1)}" y2="${up(1)}" stroke="${ink}" stroke-dasharray="5 4"/>`,
    `<text x="${left}" y="${top - 10}" font-size="12" fill="${faint}">right, % of the answers (tick: mean confidence)</text>`,
    `<text x="${left + side / 2}" y="${bottom + 38}" text-anchor="middle" font-size="12" fill="${faint}">confidence of the best genre, %</text>`,
    `<text x="${left}" y="${bottom + 62 + below + 20}" font-size="12" fill="${faint}">files (the highest bar: ${most})</text>`,
  ]);
}

type Scale = (value: number) => number;

function reliabilityBar({ from, to, clips, right, meanConfidence }: Bin, at: Scale, up: Scale): string[] {
  const [x, width, precision] = [at(from) + 1.5, at(to) - at(from) - 3, right / clips];
  return [
    `<rect x="${x}" y="${up(precision)}" width="${width}" height="${up(0) - up(precision)}" fill="${shade(0.75)}"/>`,
    `<line x1="${x}" x2="${x + width}" y1="${up(meanConfidence!)}" y2="${up(meanConfidence!)}" stroke="#c2410c" stroke-width="2.5"/>`,
  ];
}

function countBar({ from, to, clips }: Bin, at: Scale, foot: number, most: number, room: number): string {
  const height = Math.max(1, (clips / most) * room);
  return `<rect x="${at(from) + 1.5}" y="${foot - height}" width="${at(to) - at(from) - 3}" height="${height}" fill="${faint}"/>`;
}

const title = (name: string, version: string) => `${name} ${version}`;
const share = (value: number) => `${(value * 100).toFixed(1)} %`;

/** From white to blue; the square root keeps small shares visible. */
function shade(value: number): string {
  const mix = Math.sqrt(value);
  return `rgb(${blue.map((channel) => Math.round(255 + (channel - 255) * mix)).join(',')})`;
}

/** About how wide DejaVu Sans sets a text; wide scripts count double. */
function widthOf(text: string, size: number): number {
  return [...text].reduce((sum, letter) => sum + (letter > '\u2e80' ? 1 : 0.63), 0) * size;
}

function svg(width: number, height: number, parts: readonly string[]): string {
  const [w, h] = [Math.ceil(width), Math.ceil(height)];
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" viewBox="0 0 ${w} ${h}" font-family="${family}, sans-serif" fill="${ink}">\n<rect width="${w}" height="${h}" fill="#ffffff"/>\n${parts.join('\n')}\n</svg>\n`;
}

function escapeXml(text: string): string {
  return text.replace(/[<>&"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
}

// Opens examples/browser in Chromium, types a query, and prints the scores that it shows as JSON.
// Arguments: the page's address, the browser, a folder for its profile, the query, a file for a screenshot.
import { chromium } from 'playwright-core';

const [url, executablePath, profile, query, screenshot] = process.argv.slice(2);
const args = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const context = await chromium.launchPersistentContext(profile, { executablePath, args, headless: true });
const page = await context.newPage();
const problems = [];
const hosts = new Set();
page.on('pageerror', (error) => problems.push(String(error)));
page.on('request', (request) => { if (request.url().startsWith('http')) hosts.add(new URL(request.url()).host); });
await page.goto(url);

const shown = async (text) => {
  await page.waitForFunction((text) => document.querySelector('#passages').dataset.query === text, text, { timeout: 120_000 });
  return page.$$eval('#passages li', (items) => items.map((item) => [item.lastChild.textContent, Number(item.firstChild.value)]));
};
try {
  const first = await shown(await page.inputValue('#query'));
  await page.fill('#query', '');
  await page.type('#query', query);
  const second = await shown(query);
  await page.screenshot({ path: screenshot });
  console.log(JSON.stringify({ first, second, hosts: [...hosts], problems }));
} catch (error) {
  throw new Error(`${error.message}; ${problems.join('; ')}`);
} finally {
  await context.close();
}

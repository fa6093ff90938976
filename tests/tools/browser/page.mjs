// Looks at the page of `serve` as people do: on a desk and on a phone, light and dark, by mouse and by keyboard, without
// JavaScript; and as axe does for those who hear it. Ends with "the page is good", or with what is not.
//
//   node page.mjs MODULES PORT PICTURES
//
// MODULES is where npm has installed package-lock.json, PICTURES where screenshots go.
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';

const [modules, port, pictures] = process.argv.slice(2);
const require = createRequire(`${modules}/package.json`);
const { chromium } = require('playwright-core');
const axe = require('axe-core').source;

const url = `http://127.0.0.1:${port}/`;
const screens = {
  desktop: { viewport: { width: 1280, height: 900 } },
  phone: { viewport: { width: 360, height: 740 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true },
};
const browser = await chromium.launch({
  executablePath: ['/usr/bin/chromium', '/usr/bin/chromium-browser'].find(existsSync),
  // Root has no sandbox. A name that is no loopback address makes a page that browsers do not trust.
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--host-resolver-rules=MAP page.test 127.0.0.1'],
});

// The page, opened with nothing but itself.
async function open(options, at = url) {
  const context = await browser.newContext(options);
  // The first disk waits until its base is written out.
  context.setDefaultTimeout(180_000);
  const page = await context.newPage();
  page.on('request', (request) => assert.equal(new URL(request.url()).host, new URL(at).host));
  page.on('pageerror', (error) => assert.fail(error));
  // What is not HTML names no icon, for which the browser then looks: it finds none, or may not load it.
  page.on('console', (message) => {
    const said = `${message.location().url}: ${message.text()}`;
    assert(message.type() !== 'error' || said.includes('/favicon.ico'), said);
  });
  await page.goto(at);
  return page;
}

const openAll = (page) => page.evaluate(() => document.querySelectorAll('details').forEach((d) => (d.open = true)));

for (const [screen, options] of Object.entries(screens)) {
  for (const colorScheme of ['light', 'dark']) {
    const page = await open({ ...options, colorScheme });
    await page.screenshot({ path: `${pictures}/${screen}-${colorScheme}.png` });
    await openAll(page);
    await page.screenshot({ path: `${pictures}/${screen}-${colorScheme}-all.png`, fullPage: true });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    assert.equal(wide, 0, `${screen}: ${wide} pixels beyond the edge`);
    await page.evaluate(axe);
    const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ['violations', 'incomplete'] }));
    for (const { impact, id, help, nodes } of found.violations) {
      console.log(`${screen} ${colorScheme}: ${impact}: ${id}: ${help}: ${nodes[0].html}`);
    }
    const bad = found.violations.filter(({ impact }) => impact === 'serious' || impact === 'critical');
    assert.equal(bad.length, 0, 'axe');
    console.log(`${screen} ${colorScheme}: axe ${found.testEngine.version}: ${found.passes.length} rules passed, ` +
      `${found.violations.length} did not, ${found.incomplete.length} it cannot tell`);
    await page.context().close();
  }
}

// What a download waits for is shown while it is being made, on the very page that was opened.
{
  const page = await open(screens.desktop);
  const making = page.locator('#making');
  assert(!(await making.isVisible()));
  await page.evaluate(() => (globalThis.here = true));
  const link = page.locator('a[download][href$=".qcow2.xz"]').first();
  const [got] = await Promise.all([
    page.waitForEvent('download'),
    link.click(),
    making.waitFor({ state: 'visible' }).then(async () => {
      assert.match(await making.textContent(), /\.qcow2\.xz: .* of /);
      assert((await making.boundingBox()).y >= 0, 'out of sight');
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => globalThis.axe.run(document));
      assert.deepEqual(violations.map(({ help }) => help), []);
      await page.screenshot({ path: `${pictures}/being-prepared.png` });
    }),
  ]);
  await got.cancel();
  await making.waitFor({ state: 'hidden' });
  assert(await page.evaluate(() => globalThis.here), 'the page was loaded again');
  assert.equal(await page.evaluate(() => document.activeElement.getAttribute('href')), await link.getAttribute('href'));
  await page.context().close();
}

// By keyboard: past the header at once, and to everything that can be used, each with a mark around it.
{
  const page = await open(screens.desktop);
  await page.keyboard.press('Tab');
  assert((await page.locator('.skip:focus').boundingBox()).x >= 0, 'the way past the header cannot be seen');
  const usable = await page.locator('a[href], summary, button:visible, pre:visible').count();
  const reached = new Set();
  for (let i = 0; i < 2 * usable; i++) {
    const [n, outline] = await page.evaluate(() => {
      const all = [...document.querySelectorAll('a[href], summary, button, pre')].filter((e) => e.checkVisibility());
      return [all.indexOf(document.activeElement), getComputedStyle(document.activeElement).outlineStyle];
    });
    if (n < 0) break;
    assert.notEqual(outline, 'none', `nothing around ${n}`);
    reached.add(n);
    await page.keyboard.press('Tab');
  }
  assert.equal(reached.size, usable);
  await page.locator('summary').first().focus();
  await page.keyboard.press('Enter');
  assert(await page.locator('pre').first().isVisible());
  console.log(`${usable} things reached by keyboard`);
  await page.context().close();
}

// What the buttons copy: also from a page that browsers do not trust, as it is without TLS.
for (const at of [url, `http://page.test:${port}/`]) {
  const trusted = await open({ permissions: ['clipboard-read', 'clipboard-write'] });
  await trusted.evaluate(() => navigator.clipboard.writeText(''));
  const page = await open({ permissions: ['clipboard-write'] }, at);
  const box = page.locator('td .copy').first();
  await box.locator('button').click();
  await page.locator('#said', { hasText: 'Copied' }).waitFor({ state: 'attached' });
  await trusted.bringToFront();
  assert.equal(await trusted.evaluate(() => navigator.clipboard.readText()), await box.locator('code').textContent(), at);
  await page.context().close();
  await trusted.context().close();
}

// Without JavaScript nothing is missing but the buttons.
{
  const page = await open({ javaScriptEnabled: false });
  assert.equal(await page.locator('button').count(), 0);
  assert((await page.locator('a[download]').count()) > 40);
  await page.locator('summary').first().click();
  assert(await page.locator('pre').first().isVisible());
  await page.context().close();
}

// Every link, clicked; each few in a new window, because a browser does not let one page download on and on. Last, as the
// server goes on making what was asked for.
{
  let page = await open(screens.desktop);
  const links = await page.locator('a[href]').evaluateAll((all) => all.map((a) => [a.getAttribute('href'), a.hasAttribute('download')]));
  assert(links.length > 50, `${links.length} links`);
  for (const [i, [href, download]] of links.entries()) {
    if (i % 10 === 0) {
      await page.context().close();
      page = await open(screens.desktop);
    }
    const link = page.locator('a[href]').nth(i);
    if (href.startsWith('#')) {
      await link.focus();
      await page.keyboard.press('Enter');
      assert.equal(new URL(page.url()).hash, href);
    } else if (download || href.includes('.sig')) {
      const [got] = await Promise.all([page.waitForEvent('download'), link.click()]);
      assert.equal(got.url(), new URL(href, url).href);
      assert.equal(got.suggestedFilename(), decodeURIComponent(new URL(href, url).pathname.split('/').pop()));
      // What other tests get whole.
      if (href.endsWith('.sig')) assert.equal(await got.failure(), null, href);
      else await got.cancel();
    } else {
      const [answer] = await Promise.all([page.waitForResponse(new URL(href, url).href), link.click()]);
      assert.equal(answer.status(), 200, href);
      await page.goto(url);
    }
  }
  console.log(`${links.length} links`);
  await page.context().close();
}

await browser.close();
console.log('the page is good');

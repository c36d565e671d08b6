// What pages_check.py asks of a page, inside it. Every function but `all` returns sentences.
({
  words(s) { return s.trim().replace(/\s+/g, ' ').slice(0, 60); },

  // What is on the page whatever its width and colour: its faults, ids, links, pictures.
  all() {
    const main = document.querySelector('main') || document.body, bad = [], words = this.words;
    const each = (selector, f) => main.querySelectorAll(selector).forEach(f);
    each('p', p => {
      const text = p.textContent.trim();
      if (/^\p{L}$/u.test(text) && !p.closest('td, th, figure')) bad.push(`a paragraph of one letter, "${text}"`);
    });
    each('h1, h2, h3, h4', h => {
      const n = h.textContent.trim().length;
      if (n > 150) bad.push(`a heading of ${n} characters: ${words(h.textContent)}`);
    });
    const table = /^\s*\|.*\|\s*\n\s*\|[\s:|-]+\|\s*$/m;
    each('p, .cell-output pre', e => {
      if (table.test(e.textContent)) bad.push(`a table as raw text: ${words(e.textContent)}`);
    });
    const link = /\[`?[^\[\]\n]+`?\]\((?:\/|https?:|[\w.\/-]+\.(?:html|ipynb|md))[^)\s]*\)/;
    each('p, li, td, h1, h2, h3, h4, .cell-output code', e => {
      const found = link.exec(e.textContent);
      if (found && !e.querySelector('p, li, td')) bad.push(`a link as raw text: ${words(found[0])}`);
    });
    each('img', i => {
      if (!(i.getAttribute('alt') || '').trim() && i.getAttribute('role') != 'presentation')
        bad.push(`a picture without words (alt): ${words(i.src.split('/').slice(-1)[0].slice(0, 60))}`);
    });
    if (!document.querySelector('link[rel~="icon"]')) bad.push('no favicon');
    if (!document.querySelector('meta[property="og:title"]')) bad.push('no open-graph title');
    const named = [...document.querySelectorAll('[id]')].map(e => e.id);
    const links = [...document.querySelectorAll('a[href]')].map(a => [a.getAttribute('href'), a.href]);
    return {bad, links, ids: named.concat([...document.querySelectorAll('a[name]')].map(a => a.name)),
            images: main.querySelectorAll('img').length, themes: typeof quartoToggleColorScheme == 'function'};
  },

  // The innermost elements that reach beyond the screen, if the page can be pushed sideways.
  wide() {
    const w = document.documentElement.clientWidth, all = document.documentElement.scrollWidth;
    if (all <= w + 1) return [];
    const sticksOut = e => {
      if (e.getBoundingClientRect().right <= w + 1) return false;
      for (let p = e.parentElement; p && p != document.body; p = p.parentElement)
        if (getComputedStyle(p).overflowX != 'visible') return false;
      return true;
    };
    const out = [...document.querySelectorAll('body *')].filter(sticksOut);
    const inner = out.filter(e => !out.some(o => o != e && e.contains(o))).slice(0, 2);
    const kind = e => e.tagName.toLowerCase() + (e.classList[0] ? '.' + e.classList[0] : '');
    const name = e => `${kind(e)} "${this.words(e.textContent)}"`;
    return [`${all} px wide on a screen of ${w}: ${inner.map(name).join(', ')}`];
  },

  // Contrast as WCAG 2 has it: 4.5 for text, 3 for large text; backgrounds and opacities as they lie over one another.
  contrast() {
    const parse = s => {
      const m = s.match(/[\d.]+/g).map(Number), k = s.startsWith('color(') ? 255 : 1;
      return [k*m[0], k*m[1], k*m[2], m[3] ?? 1];
    };
    const over = (a, b) => [0, 1, 2].map(i => a[i]*a[3] + b[i]*(1 - a[3])).concat([1]);
    const linear = v => (v /= 255) <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4;
    const light = c => .2126*linear(c[0]) + .7152*linear(c[1]) + .0722*linear(c[2]);
    const ground = e => {
      const layers = [];
      for (let p = e; p; p = p.parentElement) {
        const c = parse(getComputedStyle(p).backgroundColor);
        if (c[3]) layers.push(c);
        if (c[3] == 1) break;
      }
      return layers.reduceRight((below, c) => over(c, below), [255, 255, 255, 1]);
    };
    const seen = new Map(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
      if (!text || e.closest('script, style, noscript, svg')) continue;
      if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
      const box = e.getBoundingClientRect(), s = getComputedStyle(e), size = parseFloat(s.fontSize);
      if (box.width < 2 || box.height < 2) continue;
      const large = size >= 24 || size >= 18.66 && s.fontWeight >= 700;
      let opacity = 1;
      for (let p = e; p; p = p.parentElement) opacity *= getComputedStyle(p).opacity;
      const back = ground(e), front = parse(s.color), key = [s.color, opacity, back, large].join();
      if (seen.has(key)) continue;
      front[3] *= opacity;
      const a = light(over(front, back)), b = light(back), ratio = (Math.max(a, b) + .05)/(Math.min(a, b) + .05);
      const where = e.tagName.toLowerCase() + [...e.classList].map(c => '.' + c).join('');
      const colours = `${s.color} on rgb(${back.slice(0, 3).map(Math.round).join(', ')})`;
      const enough = ratio >= (large ? 3 : 4.5) - .005;
      seen.set(key, enough ? '' : `contrast ${ratio.toFixed(2)} of "${this.words(text)}" (${where}, ${colours})`);
    }
    return [...seen.values()].filter(Boolean);
  },
})

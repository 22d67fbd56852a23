"use strict";
// Shows beside the text where a token looked. Without this script the same tables stand further down.
(() => {
  const tokens = [...document.querySelectorAll("a.token")];
  const panel = document.getElementById("panel");
  if (!panel || tokens.length === 0) return;
  const [layer, head, scale] = ["layer", "head", "scale"].map((name) => document.getElementById(name));
  const heads = Number(panel.dataset.heads);
  const masses = tokens.map((token) => token.dataset.mass.split(" ").map(Number));
  let current = 0;
  let pinned = false;

  const fits = (row) =>
    (layer.value === "all" || row.dataset.layer === layer.value) &&
    (head.value === "all" || row.dataset.head === head.value);

  const filter = (root) => {
    for (const row of root.querySelectorAll("tr[data-layer]")) row.hidden = !fits(row);
  };

  const show = (number) => {
    tokens[current].classList.remove("chosen");
    tokens[current].tabIndex = -1;
    current = number;
    tokens[current].classList.add("chosen");
    tokens[current].tabIndex = 0;
    const found = document.getElementById(`t${number}`);
    const title = document.createElement("h3");
    title.append(`Token ${number}: `, isolated(tokens[number].textContent));
    const facts = document.createElement("p");
    facts.textContent = tokens[number].title;
    const copy = found.cloneNode(true);
    copy.removeAttribute("id");
    filter(copy);
    const rows = [...copy.querySelectorAll("tr[data-layer]")];
    panel.replaceChildren(title, facts, copy);
    if (rows.length > 0 && rows.every((row) => row.hidden)) {
      const none = document.createElement("p");
      none.textContent = "None of the written entries are of this layer and head.";
      panel.append(none);
    }
    panel.scrollTop = 0;
  };

  const isolated = (text) => {
    const found = document.createElement("bdi");
    found.textContent = text;
    return found;
  };

  const paint = () => {
    const wanted = (i) =>
      (layer.value === "all" || Math.floor(i / heads) === layer.selectedIndex - 1) &&
      (head.value === "all" || i % heads === head.selectedIndex - 1);
    const means = masses.map((mass) => {
      const own = mass.filter((_, i) => wanted(i));
      return own.reduce((sum, value) => sum + value, 0) / Math.max(own.length, 1) / 1000;
    });
    const peak = Math.max(...means);
    tokens.forEach((token, i) => {
      token.classList.remove(...[...token.classList].filter((name) => /^m\d+$/.test(name)));
      token.classList.add(`m${peak > 0 ? Math.round((10 * means[i]) / peak) : 0}`);
    });
    scale.textContent = `${(100 * peak).toFixed(1)}%`;
    filter(document);
    show(current);
  };

  const go = (number) => {
    pinned = false;
    show(Math.min(Math.max(number, 0), tokens.length - 1));
    tokens[current].focus();
  };

  const line = (step) => {
    const from = tokens[current].getBoundingClientRect();
    let best = current;
    let top = null;
    for (let i = current + step; i >= 0 && i < tokens.length; i += step) {
      const box = tokens[i].getClientRects()[0];
      if (!box || Math.abs(box.top - from.top) < 4) continue;
      if (top === null) top = box.top;
      if (Math.abs(box.top - top) > 4) break;
      const far = (at) => Math.abs(tokens[at].getClientRects()[0].left - from.left);
      if (best === current || far(i) < far(best)) best = i;
    }
    return best;
  };

  const keys = {
    ArrowRight: () => go(current + 1),
    ArrowLeft: () => go(current - 1),
    ArrowDown: () => go(line(1)),
    ArrowUp: () => go(line(-1)),
    Home: () => go(0),
    End: () => go(tokens.length - 1),
    Enter: () => { pinned = true; panel.focus(); },
  };

  tokens.forEach((token, i) => {
    token.tabIndex = -1;
    token.addEventListener("mouseenter", () => { if (!pinned) show(i); });
    token.addEventListener("focus", () => { if (i !== current) show(i); });
    token.addEventListener("click", (event) => {
      event.preventDefault();
      pinned = !(pinned && i === current);
      show(i);
      token.focus();
    });
    token.addEventListener("keydown", (event) => {
      if (event.key in keys && !event.ctrlKey && !event.metaKey && !event.altKey) {
        event.preventDefault();
        keys[event.key]();
      }
    });
  });
  panel.addEventListener("keydown", (event) => { if (event.key === "Escape") go(current); });
  for (const choice of [layer, head]) choice.addEventListener("change", paint);
  for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
  const sums = masses.map((mass) => mass.reduce((sum, value) => sum + value, 0));
  current = sums.indexOf(Math.max(...sums));
  paint();
})();

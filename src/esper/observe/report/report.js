"use strict";
(() => {
  const all = (selector) => Array.from(document.querySelectorAll(selector));

  // Choices (axis, seed) live in the address's fragment, so a refresh keeps them.
  const choices = new URLSearchParams(location.hash.slice(1));
  const show = (name, value) => {
    const buttons = all("button[data-choice]").filter((button) => button.dataset.choice === name);
    if (!buttons.some((button) => button.dataset.value === value)) return;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
    for (const part of all("[data-when]")) {
      if (part.dataset.when === name) part.hidden = part.dataset.value !== value;
    }
  };
  for (const [name, value] of choices) show(name, value);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-choice]");
    if (!button) return;
    show(button.dataset.choice, button.dataset.value);
    choices.set(button.dataset.choice, button.dataset.value);
    history.replaceState(null, "", "#" + choices.toString());
  });

  // Tooltips: an element's own text, else the nearest reading of the chart under the pointer.
  const tip = document.getElementById("tip");
  const readings = new WeakMap();
  let lit = null;
  const readingAt = (chart, clientX) => {
    if (!readings.has(chart)) readings.set(chart, JSON.parse(chart.dataset.hover));
    const box = chart.getBoundingClientRect();
    const x = ((clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    let best = null;
    for (const item of readings.get(chart)) {
      if (best === null || Math.abs(item[0] - x) < Math.abs(best[0] - x)) best = item;
    }
    return best;
  };
  document.addEventListener("pointermove", (event) => {
    let text = null;
    if (lit) { lit.style.visibility = "hidden"; lit = null; }
    const marked = event.target.closest("[data-tip]");
    const chart = event.target.closest("svg[data-hover]");
    if (marked) {
      text = marked.dataset.tip;
    } else if (chart) {
      const reading = readingAt(chart, event.clientX);
      if (reading) {
        text = reading[1];
        lit = chart.querySelector(".crosshair");
        lit.setAttribute("transform", "translate(" + reading[0] + " 0)");
        lit.style.visibility = "visible";
      }
    }
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 12 : event.clientX + 16;
    const top = event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.max(4, top) + "px";
  });
  document.addEventListener("pointerleave", () => { tip.hidden = true; });

  // How long ago the newest event was written.
  const updated = document.getElementById("updated");
  if (updated) {
    const time = Number(updated.dataset.time) * 1000;
    const running = updated.dataset.running === "1";
    const tell = () => {
      const seconds = Math.max(0, Math.round((Date.now() - time) / 1000));
      const ago = seconds < 90 ? seconds + " s" : seconds < 5400 ? Math.round(seconds / 60) + " min"
        : seconds < 172800 ? Math.round(seconds / 3600) + " h" : Math.round(seconds / 86400) + " days";
      const stale = running && seconds > 180;
      updated.textContent = "last update " + ago + " ago" + (stale ? "; the run may have been stopped from outside" : "");
      updated.classList.toggle("stale", stale);
    };
    tell();
    setInterval(tell, 1000);
  }
})();

"use strict";
(function () {
  const root = document.documentElement;
  const key = "video-opd report " + location.pathname;
  const all = (selector) => Array.from(document.querySelectorAll(selector));

  // The reader's place: it is kept when a watched page loads itself again.
  function keepPlace() {
    const open = all("details").filter((d) => d.open).map((d) => d.id);
    const focus = document.activeElement ? document.activeElement.id : "";
    const sideways = all(".scroll").map((box) => box.scrollLeft);
    sessionStorage.setItem(key, JSON.stringify({ y: scrollY, open, focus, sideways }));
  }

  function restorePlace() {
    const kept = JSON.parse(sessionStorage.getItem(key) || "null");
    sessionStorage.removeItem(key);
    if (kept === null) return;
    all("details").forEach((d) => { d.open = kept.open.includes(d.id); });
    all(".scroll").forEach((box, i) => { box.scrollLeft = kept.sideways[i] || 0; });
    const focused = kept.focus && document.getElementById(kept.focus);
    if (focused) focused.focus({ preventScroll: true });
    scrollTo(0, kept.y);
  }

  function quietly(work) {
    try { work(); } catch (error) { /* a browser that keeps nothing for files: the page still works */ }
  }

  function loadAgain() {
    if (String(getSelection())) { setTimeout(loadAgain, 1000); return; } // the reader is about to copy
    quietly(keepPlace);
    location.reload();
  }

  quietly(() => { history.scrollRestoration = "manual"; });
  quietly(restorePlace);
  if (root.dataset.watch) {
    const watched = Date.now() / 1000 < Number(root.dataset.until);
    if (watched) setTimeout(loadAgain, Number(root.dataset.watch) * 1000);
    else document.getElementById("watched").textContent = "This report is no longer being watched.";
  }

  // On paper everything is open.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    closed.forEach((d) => { d.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((d) => { d.open = false; }));
})();

"use strict";
(function () {
  const root = document.documentElement;
  const key = "video-opd report " + location.pathname;
  const all = (selector, within) => Array.from((within || document).querySelectorAll(selector));

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

  // The tokens of a response are one stop of the Tab key; the arrow keys go from one to the next.
  all(".tokens").forEach((response) => {
    const tokens = all("button.token", response);
    const choose = (chosen) => tokens.forEach((token) => { token.tabIndex = token === chosen ? 0 : -1; });
    choose(tokens[0]);
    // What is told of a token stands right below it.
    const place = (event) => {
      const token = event.target.closest("button.token");
      if (token === null) return;
      response.classList.remove("quiet");
      token.nextElementSibling.style.top = token.offsetTop + token.offsetHeight + 3 + "px";
    };
    response.addEventListener("pointerover", place);
    response.addEventListener("focusin", (event) => { place(event); choose(event.target); });
    response.addEventListener("keydown", (event) => {
      const here = tokens.indexOf(document.activeElement);
      const there = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (event.key === "Escape") response.classList.add("quiet");
      if (here < 0 || tokens[there] === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      tokens[there].focus();
    });
  });

  // A table that is wider than its box can be moved with the arrow keys.
  const reach = () => all(".scroll").forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  });
  reach();
  addEventListener("resize", reach);

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

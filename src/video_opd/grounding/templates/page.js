"use strict";
// The page's clock is the video's where the browser plays it, and otherwise one of its own over the frames.
(function () {
  const get = (id) => document.getElementById(id);
  const video = get("video"), still = get("still"), seek = get("seek"), lines = get("lines");
  const playButton = get("play"), loopButton = get("loop"), muteButton = get("mute");
  const duration = Number(seek.dataset.duration), frameStep = Number(seek.dataset.step);
  const answers = Array.from(document.querySelectorAll(".answer"));
  const frames = Array.from(document.querySelectorAll(".strip img"));
  let onFrames = video === null;
  let playing = false, time = 0, since = 0; // of the page's own clock
  let chosen = -1, looping = false;

  const span = (answer) => [Number(answer.dataset.start), Number(answer.dataset.end)];
  const hasSpan = (answer) => answer.dataset.start !== undefined;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  function clock(seconds) {
    const hundredths = Math.round(seconds * 100), pad = (n) => String(n).padStart(2, "0");
    const minutes = Math.floor(hundredths / 6000), rest = hundredths % 6000;
    const tail = pad(Math.floor(rest / 100)) + "." + pad(rest % 100);
    if (minutes < 60) return pad(minutes) + ":" + tail;
    return Math.floor(minutes / 60) + ":" + pad(minutes % 60) + ":" + tail;
  }

  const now = () => (onFrames ? time : video.currentTime);
  const isPlaying = () => (onFrames ? playing : !video.paused && !video.ended);

  function goTo(seconds) {
    const target = clamp(seconds, 0, duration);
    if (onFrames) time = target;
    else video.currentTime = target;
    show(target);
  }

  function play() {
    if (now() >= duration - 0.02) goTo(0);
    if (onFrames) { playing = true; since = performance.now(); }
    else video.play().catch(useFrames);
    requestAnimationFrame(tick);
  }

  function pause() {
    if (onFrames) playing = false;
    else video.pause();
    show(now());
  }

  const toggle = () => (isPlaying() ? pause() : play());

  function tick(stamp) {
    if (onFrames && playing) {
      time = clamp(time + Math.max(0, stamp - since) / 1000, 0, duration);
      since = stamp;
      if (time >= duration) playing = false;
    }
    if (looping && chosen >= 0 && isPlaying()) {
      const [start, end] = span(answers[chosen]);
      if (now() >= end || now() < start - 0.05) goTo(start);
    }
    show(now());
    if (isPlaying()) requestAnimationFrame(tick);
  }

  function show(seconds) {
    const text = clock(seconds) + " of " + clock(duration);
    get("now").textContent = text.replace(" of ", " / ");
    seek.setAttribute("aria-valuenow", seconds.toFixed(2));
    seek.setAttribute("aria-valuetext", text);
    lines.style.setProperty("--at", 100 * seconds / duration + "%");
    playButton.textContent = isPlaying() ? "Pause" : "Play";
    if (onFrames && frames.length) {
      const near = frames.reduce((a, b) =>
        Math.abs(b.dataset.time - seconds) < Math.abs(a.dataset.time - seconds) ? b : a);
      if (still.src !== near.src) still.src = near.src;
      still.alt = "frame of the video at " + clock(Number(near.dataset.time));
    }
  }

  function choose(index) {
    const answer = answers[index];
    if (!answer) return;
    if (answers.includes(document.activeElement)) answer.focus(); // the focus goes along, or stays where it is
    get("status").textContent = answer.getAttribute("aria-label");
    if (!hasSpan(answer)) return;
    chosen = index;
    answers.forEach((a, i) => a.setAttribute("aria-pressed", String(i === index)));
    goTo(span(answer)[0]);
  }

  function step(direction) {
    let index = chosen;
    do index += direction; while (answers[index] && !hasSpan(answers[index]));
    if (chosen < 0 && direction < 0) index = answers.findLastIndex(hasSpan);
    if (answers[index]) choose(index);
  }

  function setLoop(on) {
    looping = on && answers.some(hasSpan);
    loopButton.setAttribute("aria-pressed", String(looping));
    if (looping && chosen < 0) choose(answers.findIndex(hasSpan));
  }

  function setMute(on) {
    if (!video || onFrames) return;
    video.muted = on;
    muteButton.setAttribute("aria-pressed", String(on));
  }

  function useFrames() {
    if (onFrames) return;
    time = video.currentTime || time;
    onFrames = true;
    video.hidden = true;
    muteButton.hidden = true;
    still.hidden = frames.length === 0;
    const notice = get("notice");
    notice.prepend("This browser does not play the video: frames of it are shown instead.");
    notice.hidden = false;
    show(time);
  }

  const keys = {
    " ": toggle,
    ArrowLeft: (event) => goTo(now() - (event.shiftKey ? frameStep : 1)),
    ArrowRight: (event) => goTo(now() + (event.shiftKey ? frameStep : 1)),
    PageUp: () => goTo(now() + 10),
    PageDown: () => goTo(now() - 10),
    ArrowUp: () => step(-1),
    ArrowDown: () => step(1),
    Home: () => goTo(0),
    End: () => goTo(duration),
    l: () => setLoop(!looping),
    m: () => setMute(!video || !video.muted),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onButton = event.target instanceof HTMLButtonElement || event.target instanceof HTMLAnchorElement;
    if (onButton && (event.key === " " || event.key === "Enter")) return; // the button's own
    if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
    else {
      const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (!act) return;
      act(event);
    }
    event.preventDefault();
  });

  function point(event) {
    const box = seek.getBoundingClientRect();
    goTo(duration * (event.clientX - box.left) / box.width);
  }

  seek.addEventListener("pointerdown", (event) => { seek.setPointerCapture(event.pointerId); point(event); });
  seek.addEventListener("pointermove", (event) => { if (event.buttons & 1) point(event); });
  document.querySelectorAll(".track").forEach((track) => track.addEventListener("click", point));
  playButton.addEventListener("click", toggle);
  loopButton.addEventListener("click", () => setLoop(!looping));
  answers.forEach((answer, index) => answer.addEventListener("click", (event) => {
    const [start, end] = span(answer);
    const again = index === chosen && now() >= start && now() < end;
    if (event.detail === 0 && again) toggle(); // by the keyboard
    else choose(index);
  }));
  if (video) {
    muteButton.addEventListener("click", () => setMute(!video.muted));
    video.controls = false;
    video.tabIndex = -1;
    video.addEventListener("click", toggle);
    video.addEventListener("error", useFrames);
    if (video.error) useFrames();
    ["pause", "ended", "seeked", "loadedmetadata"].forEach((name) =>
      video.addEventListener(name, () => { if (!onFrames) show(now()); }));
  }
  show(0);
})();

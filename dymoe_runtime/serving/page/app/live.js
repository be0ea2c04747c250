// The panel of live figures: what the engine does with its experts, as /props tells it.

import { byId, iconButton, make } from "./dom.js";
import { Meters, percent, size } from "./meters.js";
import { change, settings } from "./settings.js";
import { rate } from "./transcript.js";
import { props } from "./server.js";

const BUSY_MS = 500, IDLE_MS = 2000, WIDE = "(min-width: 1180px)";
const SVG = "http://www.w3.org/2000/svg";

export class Live {
  /** `seen(props)` is called with each reading. */
  constructor(seen) {
    this.seen = seen;
    this.meters = new Meters();
    this.busy = false;
    this.box = byId("live");
    this.parts = {};
    this.box.append(
      make("div", { className: "bar" }, make("h2", {}, "Live"), iconButton("close", "Close the live figures", () => this.toggle(false))),
      this.section("speed", "Speed", this.history()),
      this.section("tiers", "Bits of the last token", make("div", { className: "map" }), make("ul", { className: "legend" })),
      this.section("cache", "Experts found in memory", meter()),
      this.section("disk", "Read from disk"),
      this.section("memory", "Memory", meter(), make("p", { className: "note arena" }), meter("second")),
      this.section("queue", "Requests"),
    );
    document.addEventListener("visibilitychange", () => this.watch());
    this.show(settings.live ?? matchMedia(WIDE).matches);
  }

  get open() {
    return !this.box.hidden;
  }

  toggle(open = !this.open) {
    change({ live: open });
    this.show(open);
  }

  show(open) {
    this.box.hidden = !open;
    byId("open-live").setAttribute("aria-expanded", open);
    this.watch();
  }

  /** Say whether this page has an answer running, so that readings come more often. */
  set running(running) {
    this.busy = running;
    this.watch();
  }

  /** Read now, and again after a while, as long as somebody looks. */
  watch() {
    clearTimeout(this.timer);
    if (!this.open || document.hidden) return;
    this.timer = setTimeout(() => this.read(), this.busy ? BUSY_MS : IDLE_MS);
    if (!this.drawn) this.read();
  }

  async read() {
    clearTimeout(this.timer);
    if (this.reading) return;
    this.reading = true;
    try {
      this.draw(await props());
    } catch (fault) {
      this.box.classList.add("gone"); // the conversation says what is wrong once it is used
    } finally {
      this.reading = false;
    }
    if (this.open && !document.hidden) this.timer = setTimeout(() => this.read(), this.busy ? BUSY_MS : IDLE_MS);
  }

  draw(told) {
    this.drawn = true;
    this.box.classList.remove("gone");
    this.seen(told);
    const { statistics, state } = told;
    this.meters.add(performance.now() / 1000, statistics);
    this.drawSpeed(statistics);
    this.drawTiers(statistics, told.model?.tiers ?? []);
    this.drawCache(statistics);
    this.drawDisk(statistics);
    this.drawMemory(statistics, state);
    const { busy, slots, queued } = state;
    this.say("queue", `${busy} of ${slots}`, queued ? `running, and ${queued} waiting` : "running");
  }

  drawSpeed(statistics) {
    const now = this.meters.perSecond("new_tokens"), reads = this.meters.perSecond("prompt_tokens");
    const mean = statistics.tokens_per_s ?? 0;
    if (now > 0) this.say("speed", rate(now), "tokens/s");
    else if (reads > 0) this.say("speed", rate(reads), "tokens/s of the prompt");
    else this.say("speed", mean ? rate(mean) : "–", "tokens/s on average");
    const name = statistics.point ?? "", point = /^\d/.test(name) ? `point ${name}` : name;
    const prompt = statistics.prompt_tokens_per_s ? `prompts ${rate(statistics.prompt_tokens_per_s)} tokens/s` : "";
    this.note("speed", [point, prompt].filter(Boolean).join(" · "));
    const values = this.meters.history, most = Math.max(...values, mean, 1e-9);
    const points = values.map((value, i) => `${(100 * (i + 60 - values.length)) / 59},${30 - (28 * value) / most}`);
    this.line.setAttribute("points", points.join(" "));
    this.area.setAttribute("points", `${points[0]?.split(",")[0] ?? 0},30 ${points.join(" ")} 100,30`);
  }

  /** Draw a column for each layer, with a cell for each expert: the one with the largest weight on top. */
  drawTiers(statistics, ladder) {
    const layers = Object.entries(statistics.last_token_tiers ?? {});
    const map = this.parts.tiers.querySelector(".map");
    if (!layers.length) {
      map.hidden = true;
      this.say("tiers", "–", "no token yet");
      return;
    }
    map.hidden = false;
    const ranks = Math.max(...layers.map(([, tiers]) => tiers.length));
    const bits = layers.flatMap(([, tiers]) => tiers);
    const steps = [...new Set([...ladder, ...bits])].filter((tier) => tier > 0).sort((a, b) => a - b);
    map.style.setProperty("--ranks", ranks);
    map.style.setProperty("--layers", layers.length);
    fill(map, layers.length * ranks, () => make("span"));
    layers.forEach(([layer, tiers], column) => {
      for (let rank = 0; rank < ranks; rank++) {
        const cell = map.children[column * ranks + rank], tier = tiers[rank];
        paint(cell, tier, steps);
        cell.title = tier === undefined ? "" : `layer ${layer}, expert ${rank + 1}: ${named(tier)}`;
      }
    });
    const mean = bits.reduce((sum, tier) => sum + tier, 0) / bits.length;
    this.say("tiers", mean.toFixed(2), "bits on average");
    const shares = statistics.tier_shares ?? {};
    const all = [...steps.filter((tier) => String(tier) in shares || bits.includes(tier)), ...("0" in shares || bits.includes(0) ? [0] : [])];
    const legend = this.parts.tiers.querySelector(".legend");
    fill(legend, all.length, () => make("li", {}, make("span"), make("b"), make("i")));
    all.forEach((tier, i) => {
      const [swatch, name, share] = legend.children[i].children;
      paint(swatch, tier, steps);
      name.textContent = named(tier);
      share.textContent = percent(bits.filter((other) => other === tier).length / bits.length);
    });
    const heading = `${layers.length} layers, largest weight on top`;
    this.note("tiers", `${heading} · ${(statistics.bits_mean ?? 0).toFixed(2)} bits since the start`);
    map.setAttribute("role", "img");
    map.setAttribute("aria-label", `Bits of the experts of the last token, by layer. ${[...legend.children].map((entry) => entry.textContent).join(", ")}`);
  }

  drawCache(statistics) {
    const requests = this.meters.grown("expert_requests"), hits = this.meters.grown("expert_hits");
    const whole = statistics.hit_rate ?? 0, now = requests ? hits / requests : whole;
    this.say("cache", percent(now), requests ? "of the last seconds" : "since the start");
    this.bar("cache", now);
    const ahead = statistics.look_ahead ?? {};
    const found = ahead.reads ? ` · ${percent(ahead.hits / ahead.reads)} of ${ahead.reads.toLocaleString("en")} prefetches used` : "";
    this.note("cache", `${percent(whole)} since the start${found}`);
  }

  drawDisk(statistics) {
    const speed = this.meters.perSecond("read_bytes");
    const [value, unit] = size(speed).split(" ");
    this.say("disk", value, `${unit}/s`);
    const parts = [`${size(statistics.read_bytes ?? 0)} so far`, `${size(statistics.read_bytes_per_token ?? 0)} a token`];
    if (statistics.wait_s !== undefined) parts.push(`${statistics.wait_s.toFixed(1)} s waited`);
    this.note("disk", parts.join(" · "));
  }

  drawMemory(statistics, { resident_bytes: used, memory_bytes: budget }) {
    this.say("memory", size(used), budget ? `of ${size(budget)}` : "in use");
    this.bar("memory", budget ? used / budget : 0);
    const held = statistics.resident_bytes ?? 0, arena = statistics.arena_bytes ?? 0;
    this.parts.memory.querySelector(".arena").textContent = arena ? `experts ${size(held)} of ${size(arena)}` : "";
    const second = this.parts.memory.querySelector(".second");
    second.hidden = !arena;
    second.firstChild.style.width = percent(arena ? Math.min(1, held / arena) : 0);
  }

  section(name, title, ...parts) {
    const figure = make("p", { className: "figure" }, make("b"), make("span"));
    const made = make("section", { className: name }, make("h3", {}, title), figure, ...parts, make("p", { className: "note last" }));
    this.parts[name] = made;
    return made;
  }

  say(name, value, unit) {
    const [number, text] = this.parts[name].querySelector(".figure").children;
    number.textContent = value;
    text.textContent = unit;
  }

  note(name, text) {
    this.parts[name].querySelector(".last").textContent = text;
  }

  bar(name, share) {
    this.parts[name].querySelector(".meter").firstChild.style.width = percent(Math.min(1, share));
  }

  history() {
    const drawing = document.createElementNS(SVG, "svg");
    drawing.setAttribute("viewBox", "0 0 100 31");
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("aria-hidden", "true");
    drawing.classList.add("history");
    this.area = document.createElementNS(SVG, "polygon");
    this.line = document.createElementNS(SVG, "polyline");
    drawing.append(this.area, this.line);
    return drawing;
  }
}

function meter(name = "") {
  return make("div", { className: `meter ${name}`, "aria-hidden": "true" }, make("span"));
}

/** Give an element as many children as needed. */
function fill(element, count, makeOne) {
  while (element.children.length > count) element.lastChild.remove();
  while (element.children.length < count) element.append(makeOne());
}

function paint(element, tier, steps) {
  element.className = tier === undefined ? "none" : tier === 0 ? "skipped" : "tier";
  const at = steps.indexOf(tier);
  element.style.setProperty("--level", steps.length > 1 ? at / (steps.length - 1) : 1);
}

function named(tier) {
  return tier ? `${tier} bits` : "skipped";
}

// Rates of the last seconds, out of counters that only grow.

const WINDOW_S = 5, HISTORY = 60;

export class Meters {
  constructor() {
    this.samples = []; // [seconds, statistics] of the last readings, oldest first
    this.history = []; // tokens per second at each reading
  }

  /** Take a reading at a time in seconds; a server that began anew begins the counts anew. */
  add(time, statistics) {
    const before = this.samples.at(-1)?.[1];
    if (before && before.new_tokens > statistics.new_tokens) this.samples = [];
    this.samples.push([time, statistics]);
    while (this.samples.length > 2 && time - this.samples[1][0] >= WINDOW_S) this.samples.shift();
    this.history.push(this.perSecond("new_tokens"));
    if (this.history.length > HISTORY) this.history.shift();
  }

  /** Return how much a counter grew per second, lately. */
  perSecond(name) {
    const [first, last] = [this.samples[0], this.samples.at(-1)];
    return last[0] > first[0] ? this.grown(name) / (last[0] - first[0]) : 0;
  }

  /** Return how much a counter grew, lately. */
  grown(name) {
    return (this.samples.at(-1)[1][name] ?? 0) - (this.samples[0][1][name] ?? 0);
  }
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function size(bytes) {
  let unit = 0, value = bytes;
  for (; value >= 1000 && unit < UNITS.length - 1; unit++) value /= 1024;
  return `${unit && value < 10 ? value.toFixed(2) : value < 100 && unit ? value.toFixed(1) : value.toFixed(0)} ${UNITS[unit]}`;
}

export function percent(share) {
  const value = 100 * share;
  return `${value > 0 && value < 99.95 && (value < 10 || value > 99) ? value.toFixed(1) : value.toFixed(0)}%`;
}

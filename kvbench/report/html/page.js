"use strict";
// Sorts and filters the tables, and shows single samples. Text from the data only ever becomes
// text: no markup is made of it.
(() => {
  const get = (id) => document.getElementById(id);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const say = (text) => { if (get("said")) get("said").textContent = text; };

  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null));
    return made;
  };

  // ---- sorting: numbers by data-value, everything else by its text; what is missing comes last

  const keyOf = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    const text = cell.textContent.trim();
    return cell.classList.contains("number") || text === "-" ? null : text;
  };

  const compare = (a, b) => typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  const sort = (heading) => {
    const table = heading.closest("table");
    const ascending = heading.getAttribute("aria-sort") === "none"
      ? !heading.classList.contains("number") : heading.getAttribute("aria-sort") === "descending";
    const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, heading.cellIndex), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return ascending ? compare(a, b) : compare(b, a);
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
    for (const other of all("thead th", table)) other.setAttribute("aria-sort", "none");
    const order = ascending ? "ascending" : "descending";
    heading.setAttribute("aria-sort", order);
    say(`Sorted by ${heading.textContent.trim()}, ${order}.`);
  };

  for (const heading of all("table.sortable thead th")) {
    heading.setAttribute("aria-sort", "none");
    heading.querySelector("button").addEventListener("click", () => sort(heading));
  }

  // ---- filters

  const filter = () => {
    const value = (name) => get(`filter-${name}`).value;
    const [model, protocol, task] = ["model", "protocol", "task"].map(value);
    const method = value("method").trim().toLowerCase();
    for (const block of all("#leaderboard .block")) {
      const { dataset } = block;
      const tasks = all("thead [data-task]", block).map((th) => th.dataset.task);
      const hidden = Boolean((model && dataset.model !== model)
        || (protocol && dataset.protocol !== protocol) || (task && !tasks.includes(task)));
      for (const part of all(`.block[data-block="${dataset.block}"]`)) part.hidden = hidden;
    }
    for (const cell of all("table.leaderboard [data-task]")) {
      cell.hidden = Boolean(task) && cell.dataset.task !== task;
    }
    for (const row of all("table.sortable tbody tr")) {
      const summary = row.closest("table").classList.contains("failures") ? "mean" : "";
      const wanted = task || summary;
      row.hidden = !row.dataset.method.toLowerCase().includes(method)
        || Boolean(wanted && row.dataset.task && row.dataset.task !== wanted);
    }
    const shown = all("#leaderboard .block:not([hidden]) tbody tr:not([hidden])").length;
    say(`Lines in the leaderboard: ${shown}.`);
  };

  if (get("filters")) {
    get("filters").addEventListener("input", () => { filter(); follow(); });
    get("filters").addEventListener("submit", (event) => event.preventDefault());
    filter();
    say("");
  }

  // ---- single samples

  const BASELINE = "fp16";
  const parsed = new Map();
  const data = (kind, key) => {
    const name = `${kind} ${key}`;
    if (!parsed.has(name)) {
      const found = all(`script[data-${kind}]`).find((script) => script.dataset[kind] === key);
      parsed.set(name, found ? JSON.parse(found.textContent) : null);
    }
    return parsed.get(name);
  };

  const browse = (name) => get(`browse-${name}`);
  const group = () => data("answers", `${browse("block").value}/${browse("task").value}`);
  const dataset = () => browse("block").selectedOptions[0].dataset.dataset;
  const baseline = (found) => found.methods.findIndex(([spec]) => spec === BASELINE);
  const outcome = (found, method, sample) => found.outcomes[found.cells[method]?.[sample]] ?? null;

  const TESTS = {
    all: () => true,
    lost: (mine, fp16) => mine && fp16?.[0] === "right" && mine[0] !== "right",
    gained: (mine, fp16) => mine?.[0] === "right" && fp16 && fp16[0] !== "right",
    changed: (mine, fp16) => mine && fp16 && mine[1] !== fp16[1],
    failed: (mine) => !mine || (mine[0] !== "right" && mine[0] !== "wrong"),
  };

  const fill = (select, options) => {
    const before = select.value;
    select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
    if (options.some(([value]) => String(value) === before)) select.value = before;
  };

  const listTasks = () => {
    const prefix = `${browse("block").value}/`;
    const keys = all("script[data-answers]").map((script) => script.dataset.answers);
    const tasks = keys.filter((key) => key.startsWith(prefix)).map((key) => key.slice(prefix.length));
    const labels = new Map(all("#filter-task option").map((option) => [option.value, option.text]));
    fill(browse("task"), tasks.map((task) => [task, labels.get(task) ?? task]));
    listMethods();
  };

  const listMethods = () => {
    fill(browse("method"), [["", "any method"], ...group().methods.filter(([spec]) => spec !== BASELINE)]);
    listSamples();
  };

  const listSamples = () => {
    const found = group();
    const fp16 = baseline(found);
    const chosen = browse("method").value;
    const methods = [...found.methods.keys()].filter((place) => place !== fp16
      && (!chosen || found.methods[place][0] === chosen));
    const test = TESTS[browse("show").value];
    const options = [];
    for (const [sample, id] of found.samples.entries()) {
      const hits = methods.filter((m) => test(outcome(found, m, sample), outcome(found, fp16, sample)));
      const anyway = browse("show").value === "all";
      if (!anyway && hits.length === 0) continue;
      const right = found.methods.filter((_, m) => outcome(found, m, sample)?.[0] === "right").length;
      options.push([sample, `${id}: ${right} of ${found.methods.length} right`]);
    }
    fill(browse("sample"), options);
    if (browse("sample").selectedIndex < 0 && options.length) browse("sample").selectedIndex = 0;
    get("browse-count").textContent = `${options.length} of ${found.samples.length} samples`;
    show();
  };

  // The cells of an answer and of where it left fp16's; from there on it is marked.
  const answerCells = ([, answer, , error], fp16) => {
    const cells = (left, ...text) => [element("td", {}, ...text), element("td", {}, left)];
    const reference = fp16?.[1] ?? null;
    if (answer === null) return cells("-", error ?? "-");
    if (reference === null) return cells("-", answer || "(empty)");
    if (answer === reference) return cells("same answer", answer || "(empty)");
    const [here, there] = [[...answer], [...reference]];
    let same = 0;
    while (same < here.length && here[same] === there[same]) same += 1;
    const rest = element("mark", {}, here.slice(same).join("") || "(ends here)");
    return cells(`at character ${same + 1}`, here.slice(0, same).join(""), rest);
  };

  const number = (value) => element("td", { class: "number" }, value === null ? "-" : String(value));

  const answersTable = (found, sample) => {
    const fp16 = outcome(found, baseline(found), sample);
    const rows = found.methods.map(([spec, label], method) => {
      const mine = outcome(found, method, sample);
      const name = element("th", { scope: "row" }, label);
      if (!mine) return element("tr", {}, name, element("td", { colspan: 6 }, "no answer yet"));
      const other = spec === BASELINE ? null : fp16;
      return element("tr", {}, name, ...answerCells(mine, other),
        element("td", { class: mine[0] === "right" ? "right" : "off" }, mine[0]),
        element("td", {}, mine[2] ?? "-"),
        number(found.kl_first[method][sample]), number(found.kl_mean[method][sample]));
    });
    const titles = ["Method", "Answer", "Left FP16", "Verdict", "Read as", "KL first", "KL mean"];
    return element("div", { class: "scroll" }, element("table", {},
      element("caption", {}, "Marked: from the first character that is not FP16's. KL to FP16 in nats, at "
        + "the first answer token and over FP16's answer."),
      element("thead", {}, element("tr", {}, ...titles.map((t) => element("th", { scope: "col" }, t)))),
      element("tbody", {}, ...rows)));
  };

  const picture = (key, id) => {
    const found = data("pictures", key)?.[id];
    if (!found) return [];
    const [content, width, height, shown, total] = found;
    const words = shown === total ? `${total} images` : `The first ${shown} of ${total} images`;
    const image = element("img", { src: `data:image/webp;base64,${content}`, width: 1.5 * width,
      height: 1.5 * height, alt: `${words} of the sample, in reading order` });
    return [image, element("p", { class: "soft" }, `${words}, in reading order.`)];
  };

  const question = (key, id) => {
    const found = data("questions", key);
    const sample = found?.samples[id];
    if (!sample) return [element("p", { class: "soft" }, "Rows hold no questions: give kvbench report the data.")];
    const [instruction, context, choices, truth, remark] = sample;
    const options = choices?.map((text) => element("li", text === truth ? { class: "right" } : {},
      text + (text === truth ? " (right)" : "")));
    return [
      ...picture(key, id),
      remark ? element("p", { class: "soft" }, remark) : null,
      element("p", { class: "text soft" }, found.instructions[instruction]),
      element("p", { class: "text" }, context),
      options ? element("ol", {}, ...options) : element("p", { class: "text" }, `Right: ${truth}`),
    ];
  };

  const show = () => {
    const found = group();
    const value = browse("sample").value;
    if (value === "") return get("sample").replaceChildren(element("p", {}, "No sample is like that."));
    const id = found.samples[value];
    const [tokens, kept, total, cut, prompt, images] = found.facts[value];
    const facts = `${tokens} prompt tokens, ${kept} of ${total} images${cut ? ", cut to fit" : ""}; `
      + `prompt ${prompt}, images ${images} (SHA-256, beginning)`;
    get("sample").replaceChildren(
      element("h3", {}, `${found.label}, sample ${id}`),
      ...question(`${dataset()}/${found.task}`, String(id)).filter((part) => part !== null),
      answersTable(found, value), element("p", { class: "soft" }, facts));
  };

  // The samples shown follow the filters of the page.
  const follow = () => {
    const shown = all("#leaderboard .block:not([hidden])").map((block) => block.dataset.block);
    const task = get("filter-task").value;
    if (!shown.includes(browse("block").value) && shown.length) [browse("block").value] = shown;
    listTasks();
    if (all("option", browse("task")).some((option) => option.value === task)) {
      browse("task").value = task;
      listMethods();
    }
  };

  if (get("browse")) {
    get("browse").addEventListener("submit", (event) => event.preventDefault());
    browse("block").addEventListener("change", listTasks);
    browse("task").addEventListener("change", listMethods);
    for (const name of ["show", "method"]) browse(name).addEventListener("change", listSamples);
    browse("sample").addEventListener("change", show);
    listTasks();
  }
})();

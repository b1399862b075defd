"use strict";
// The trace browser. Texts are set as text, never as markup.
(function () {
  const source = document.getElementById("data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const PART = 20;
  const at = (id) => document.getElementById(id);
  const chosen = { verdict: "", run: "", order: "", search: "" };
  let found = [];
  let shown = 0;

  function make(kind, name, text) {
    const element = document.createElement(kind);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function fact(list, name, value) {
    if (value === undefined) return;
    const item = make("div");
    item.append(make("span", "", name + " "), make("b", "", String(value)));
    list.append(item);
  }

  function folded(title, text, open) {
    const details = make("details", "thought");
    details.open = open;
    details.append(make("summary", "", title), make("pre", "", text));
    return details;
  }

  function card(row) {
    const good = row.verdict === "correct";
    const article = make("article", good ? "good" : row.verdict === "not judged" ? "" : "bad");
    const top = make("div", "top");
    top.append(make("span", "badge verdict", row.verdict.replaceAll("_", " ")));
    if (row.cut) top.append(make("span", "badge", "cut off"));
    if (row.forced) top.append(make("span", "badge", "thought bounded"));
    if (data.runs.length > 1) top.append(make("span", "", data.runs[row.run]));
    if (row.step !== undefined) top.append(make("span", "", "step " + row.step));
    if (row.kind) top.append(make("span", "", row.kind));
    if (row.sample) top.append(make("span", "", "sample " + row.sample));
    if (row.stratum) top.append(make("span", "", row.stratum));
    if (row.tokens !== undefined) top.append(make("span", "", row.tokens.toLocaleString("en") + " tokens"));
    if (row.id) {
      const id = make("button", "id", row.id);
      id.type = "button";
      id.title = "show every sample of this problem";
      id.addEventListener("click", () => only(row.id));
      top.append(id);
    }
    article.append(top);
    if (row.question) article.append(make("p", "question", row.question));
    if (row.thought) {
      const count = row.thought.length.toLocaleString("en");
      article.append(folded("thought, " + count + " characters", row.thought, at("open").checked));
    }
    if (row.solution) article.append(make("pre", "", row.solution));
    else article.append(make("p", "note", row.thought ? "Nothing follows the thought." : "The completion is empty."));
    if (row.reference) article.append(folded("the trace in the training data", row.reference, false));
    const facts = make("div", "facts");
    fact(facts, "found", row.extracted);
    fact(facts, "right answer", row.gold);
    fact(facts, "reward", row.reward);
    const parts = Object.entries(row.rewards || {});
    if (parts.length > 1 || (parts.length && parts[0][1] !== row.reward)) {
      for (const [name, value] of parts) fact(facts, name, value === null ? "–" : value);
    }
    if (facts.childElementCount) article.append(facts);
    return article;
  }

  function matches(row, but) {
    if (but !== "verdict" && chosen.verdict && row.verdict !== chosen.verdict) return false;
    if (chosen.run !== "" && row.run !== Number(chosen.run)) return false;
    if (!chosen.search) return true;
    return ["id", "question", "thought", "solution", "extracted", "kind", "stratum"].some(
      (key) => row[key] !== undefined && String(row[key]).toLowerCase().includes(chosen.search)
    );
  }

  const size = (row) => (row.tokens !== undefined ? row.tokens : (row.thought || "").length + (row.solution || "").length);
  const orders = {
    long: (a, b) => size(b) - size(a),
    short: (a, b) => size(a) - size(b),
    reward: (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity) || 0,
    late: (a, b) => (b.step ?? -1) - (a.step ?? -1),
  };

  function extend() {
    const part = document.createDocumentFragment();
    for (const row of found.slice(shown, shown + PART)) part.append(card(row));
    at("list").append(part);
    shown = Math.min(found.length, shown + PART);
    at("more").hidden = shown >= found.length;
    const many = found.length.toLocaleString("en");
    at("count").textContent = found.length ? shown + " of " + many + " shown" : "No sample matches.";
  }

  function chips() {
    const counts = new Map();
    for (const row of data.rows) if (matches(row, "verdict")) counts.set(row.verdict, (counts.get(row.verdict) || 0) + 1);
    const names = [...counts.keys()].sort((a, b) => (b === "correct") - (a === "correct") || counts.get(b) - counts.get(a));
    if (chosen.verdict && !counts.has(chosen.verdict)) names.push(chosen.verdict);
    const all = [...counts.values()].reduce((sum, count) => sum + count, 0);
    at("verdicts").replaceChildren(
      ...["", ...names].map((name) => {
        const chip = make("button", "", name ? name.replaceAll("_", " ") : "all");
        chip.type = "button";
        chip.setAttribute("aria-pressed", String(chosen.verdict === name));
        chip.append(make("span", "", (name ? counts.get(name) || 0 : all).toLocaleString("en")));
        chip.addEventListener("click", () => {
          chosen.verdict = name;
          show();
        });
        return chip;
      })
    );
  }

  function show() {
    found = data.rows.filter((row) => matches(row));
    if (orders[chosen.order]) found.sort(orders[chosen.order]);
    shown = 0;
    at("list").replaceChildren();
    chips();
    extend();
  }

  function only(id) {
    Object.assign(chosen, { verdict: "", run: "", search: id.toLowerCase() });
    at("run").value = "";
    at("search").value = id;
    show();
    at("traces").scrollIntoView();
  }

  data.runs.forEach((name, i) => {
    if (!data.rows.some((row) => row.run === i)) return;
    const option = make("option", "", name);
    option.value = String(i);
    at("run").append(option);
  });
  for (const id of ["run", "order"]) {
    at(id).addEventListener("change", () => {
      chosen[id] = at(id).value;
      show();
    });
  }
  at("search").addEventListener("input", () => {
    chosen.search = at("search").value.trim().toLowerCase();
    show();
  });
  at("open").addEventListener("change", () => {
    for (const details of document.querySelectorAll(".thought")) details.open = at("open").checked;
  });
  at("more").addEventListener("click", extend);
  at("filters").hidden = false;
  show();
})();

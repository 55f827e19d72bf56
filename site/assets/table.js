// The table of methods: filters, text search, sorting and a few picked to compare, kept in the address. Without this file it
// is a plain table.
(function () {
  "use strict";

  const MOST = 5;                                           // methods one can compare

  function setUp() {
    const finder = document.querySelector(".finder");
    if (!finder || finder.dataset.ready) return;
    finder.dataset.ready = "true";
    const form = finder.querySelector("form");
    const body = finder.querySelector("tbody");
    const rows = [...body.rows];
    const heads = [...finder.querySelectorAll("th[data-sort]")];
    const facets = [...form.querySelectorAll("select")].map((select) => select.name);
    const sorted = { key: "date", down: true };
    const boxes = [...finder.querySelectorAll(".pick input")];
    const panel = finder.querySelector(".finder-picked");
    const only = panel.querySelector(".pick-only");
    const picked = () => boxes.filter((box) => box.checked).map((box) => box.value);

    function values() {
      const found = new URLSearchParams();
      for (const [key, value] of new FormData(form)) if (value.trim()) found.set(key, value.trim());
      if (picked().length) found.set("pick", picked().join(","));
      if (only.getAttribute("aria-pressed") === "true") found.set("compare", "1");
      if (sorted.key !== "date" || !sorted.down) found.set("sort", (sorted.down ? "-" : "") + sorted.key);
      return found;
    }

    function matches(row, wanted) {
      const words = (wanted.get("text") || "").toLowerCase().split(/\s+/);
      const has = (facet) => {
        if (!wanted.has(facet)) return true;
        const own = row.dataset[facet];                     // a venue may hold a space, terms never do
        return own === wanted.get(facet) || (facet !== "venue" && own.split(" ").includes(wanted.get(facet)));
      };
      if (wanted.has("compare")) return picked().includes(row.dataset.slug);
      return words.every((word) => row.dataset.text.includes(word)) && facets.every(has);
    }

    function filter() {
      const wanted = values();
      let count = 0;
      for (const row of rows) {
        row.hidden = !matches(row, wanted);
        count += !row.hidden;
      }
      for (const select of form.querySelectorAll("select")) select.classList.toggle("is-set", select.value !== "");
      finder.querySelector(".finder-count").textContent =
        count === rows.length ? `${count} methods` : `${count} of ${rows.length} methods`;
      finder.querySelector(".finder-none").hidden = count > 0;
      finder.querySelector(".table-box").hidden = count === 0;
      const query = wanted.toString();
      history.replaceState(history.state, "", location.pathname + (query ? "?" + query : "") + location.hash);
    }

    function showPicked() {
      const slugs = picked();
      const full = slugs.length >= MOST;
      for (const box of boxes) box.disabled = full && !box.checked;
      panel.hidden = slugs.length === 0;
      only.disabled = slugs.length < 2;
      if (slugs.length < 2) only.setAttribute("aria-pressed", "false");
      const rowOf = (slug) => body.querySelector(`tr[data-slug="${slug}"]`);
      panel.querySelector("span").textContent = slugs.map((slug) => rowOf(slug).querySelector("th a").textContent).join(", ");
      const ready = slugs.filter((slug) => rowOf(slug).dataset.kind === "patch" && rowOf(slug).dataset.implemented === "yes");
      panel.querySelector(".pick-code").hidden = ready.length === 0;
      panel.querySelector(".pick-code code").textContent =
        `from methods import ${ready.join(", ")}\n\nwith ${ready.map((slug) => `${slug}.apply(pipe)`).join(", ")}:\n    pipe(...)`;
    }

    let library;                                            // the BibTeX of all, fetched when first asked for
    async function cite() {
      library ??= fetch("../catalog.bib").then((answer) => answer.text());
      const items = (await library).split(/\n(?=@)/);
      const keys = picked().map((slug) => body.querySelector(`tr[data-slug="${slug}"]`).dataset.cite);
      panel.querySelector(".pick-bibtex code").textContent =
        items.filter((item) => keys.some((key) => item.includes(`{${key},`))).map((item) => item.trim()).join("\n\n");
    }

    function sort(key, down) {
      Object.assign(sorted, { key, down });
      const sign = down ? -1 : 1;
      const order = (a, b) => sign * a.dataset[key].localeCompare(b.dataset[key]) || a.dataset.name.localeCompare(b.dataset.name);
      body.append(...rows.sort(order));
      for (const head of heads) {
        if (head.dataset.sort === key) head.setAttribute("aria-sort", down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      }
    }

    function restore() {
      const asked = new URLSearchParams(location.search);
      for (const field of form.elements) if (field.name) field.value = asked.get(field.name) || "";
      for (const select of form.querySelectorAll("select")) if (select.selectedIndex < 0) select.value = "";
      const wanted = asked.get("sort") || "-date";
      const key = wanted.replace(/^-/, "");
      if (heads.some((head) => head.dataset.sort === key)) sort(key, wanted.startsWith("-"));
      const slugs = (asked.get("pick") || "").split(",").slice(0, MOST);
      for (const box of boxes) box.checked = slugs.includes(box.value);
      only.setAttribute("aria-pressed", String(asked.has("compare")));
      showPicked();
      filter();
    }

    for (const head of heads) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.addEventListener("click", () => {
        sort(head.dataset.sort, sorted.key === head.dataset.sort && !sorted.down);
        filter();
      });
      head.replaceChildren(button);
    }
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
    finder.querySelector(".finder-none button").addEventListener("click", () => form.reset());
    for (const box of boxes) {
      box.parentElement.hidden = false;
      box.addEventListener("change", () => { showPicked(); cite(); filter(); });
    }
    only.addEventListener("click", () => {
      only.setAttribute("aria-pressed", String(only.getAttribute("aria-pressed") !== "true"));
      filter();
    });
    panel.querySelector(".pick-none").addEventListener("click", () => {
      for (const box of boxes) box.checked = false;
      showPicked();
      filter();
    });
    panel.querySelector("details").addEventListener("toggle", cite);
    form.hidden = false;
    restore();
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", setUp);
  else setUp();
  if (window.document$) window.document$.subscribe(setUp);
})();

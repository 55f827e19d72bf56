// The table of methods: filters, text search and sorting, kept in the address. Without this file it is a plain table.
(function () {
  "use strict";

  const FACETS = ["application", "training", "criterion", "mechanism", "venue", "year", "implemented"];

  function setUp() {
    const finder = document.querySelector(".finder");
    if (!finder || finder.dataset.ready) return;
    finder.dataset.ready = "true";
    const form = finder.querySelector("form");
    const body = finder.querySelector("tbody");
    const rows = [...body.rows];
    const heads = [...finder.querySelectorAll("th[data-sort]")];
    const sorted = { key: "date", down: false };

    function values() {
      const found = new URLSearchParams();
      for (const [key, value] of new FormData(form)) if (value.trim()) found.set(key, value.trim());
      if (sorted.key !== "date" || sorted.down) found.set("sort", (sorted.down ? "-" : "") + sorted.key);
      return found;
    }

    function matches(row, wanted) {
      const words = (wanted.get("text") || "").toLowerCase().split(/\s+/);
      const has = (facet) => {
        if (!wanted.has(facet)) return true;
        const own = row.dataset[facet];                     // a venue may hold a space, terms never do
        return own === wanted.get(facet) || (facet !== "venue" && own.split(" ").includes(wanted.get(facet)));
      };
      return words.every((word) => row.dataset.text.includes(word)) && FACETS.every(has);
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
      const key = (asked.get("sort") || "date").replace(/^-/, "");
      if (heads.some((head) => head.dataset.sort === key)) sort(key, (asked.get("sort") || "").startsWith("-"));
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
    form.hidden = false;
    restore();
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", setUp);
  else setUp();
  if (window.document$) window.document$.subscribe(setUp);
})();

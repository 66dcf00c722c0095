// The table of languages: sorted by its headings, filtered by its field; the dots of the pictures follow it.
(() => {
  const table = document.getElementById("languages");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const dots = [...document.querySelectorAll("[data-language]")];
  const value = (row, column) => row.cells[column].dataset.value;

  table.querySelectorAll("thead th").forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const text = heading.classList.contains("text") || column === 0;
      const ascending = heading.ariaSort ? heading.ariaSort === "descending" : text;
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const order = (a, b) =>
        text ? value(a, column).localeCompare(value(b, column)) : value(a, column) - value(b, column);
      rows.sort((a, b) => (ascending ? order(a, b) : order(b, a)));
      body.append(...rows);
    });
  });

  const field = document.getElementById("filter");
  const shown = document.getElementById("shown");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = new Set();
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      if (!row.hidden) kept.add(row.dataset.row);
    }
    for (const dot of dots) dot.classList.toggle("dim", !kept.has(dot.dataset.language));
    shown.textContent = kept.size;
  });

  const light = (event, on) => {
    const tag = event.target.closest("tr")?.dataset.row;
    for (const dot of dots) if (dot.dataset.language === tag) dot.classList.toggle("lit", on);
  };
  body.addEventListener("mouseover", (event) => light(event, true));
  body.addEventListener("mouseout", (event) => light(event, false));
})();

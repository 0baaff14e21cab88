"use strict";
// Sorts the table of registrations by the column whose head is pressed; pairs without
// its number come last either way.
(() => {
  const table = document.getElementById("pairs");
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.querySelectorAll("button[data-column]")];

  function compare(cell, rising) {
    const key = (row) => {
      const found = row.cells[cell];
      if (!("value" in found.dataset)) return found.textContent;
      return found.dataset.value === "" ? null : Number(found.dataset.value);
    };
    return (a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "string" ? x.localeCompare(y) : x - y;
      return rising ? order : -order;
    };
  }

  for (const head of heads)
    head.addEventListener("click", () => {
      const cell = Number(head.dataset.column) + 1;
      const name = head.closest("th");
      // The largest number first: the worst loss, the most folds; then the other way.
      const order = ["descending", "ascending"];
      const rising = cell === 1
        ? name.getAttribute("aria-sort") !== "ascending"
        : name.getAttribute("aria-sort") === order[0];
      for (const other of heads) other.closest("th").removeAttribute("aria-sort");
      name.setAttribute("aria-sort", rising ? "ascending" : "descending");
      body.replaceChildren(...[...original].sort(compare(cell, rising)));
    });
  table.dataset.ready = "yes";
})();

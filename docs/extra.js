// Names and focus that the theme leaves out; without the focus a keyboard cannot scroll a wide table.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((area) => area.setAttribute("tabindex", "0"));
  document.querySelectorAll("nav.md-code__nav").forEach((nav, index) => nav.setAttribute("aria-label", `Code ${index + 1}`));
});

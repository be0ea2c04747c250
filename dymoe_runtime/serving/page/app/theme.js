// Runs before the page is drawn, so that it does not flash in the wrong colours.
try {
  const { theme } = JSON.parse(localStorage.getItem("settings") ?? "{}");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Without storage, the theme is that of the system.
}

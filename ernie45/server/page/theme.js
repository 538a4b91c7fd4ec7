// The chosen colours, set before the first paint: a classic script, as modules run only after the page is parsed.
// Without a choice, or without storage, the system's colours hold.
(() => {
  try {
    const { theme } = JSON.parse(localStorage.getItem("ernie45.settings")) ?? {};
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // nothing stored that can be read
  }
})();

(() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  try {
    const kept = localStorage.getItem("torchprune-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* a place without storage: the system's theme */ }
})();

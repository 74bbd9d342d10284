// What can be seen without responses comes first, then the first responses, then the picture.

startControls();
startResponses();
for (const { show } of views) show();

document.addEventListener("DOMContentLoaded", async () => {
  view(["chosen", "other", "run", "query", "sort", "order", "page"], showResponses);
  try {
    await showResponses();
    performance.mark("responses");
    // One frame, so that they are painted before plotly is read.
    await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)));
    await startFront();
  } catch (error) {
    byId("count").textContent = `This browser cannot show the page: ${error.message}`;
    throw error;
  }
});

"use strict";
// Sliders over step counts, and pictures enlarged. Every picture is one that the table of all step counts holds: nothing is loaded, nothing is held twice.
(() => {
  const dialog = document.querySelector("dialog.enlarged");
  const plural = (steps) => `${steps} step${steps === "1" ? "" : "s"}`;

  const enlarge = (shown, prompt) => {
    dialog.querySelector(".sides").replaceChildren(
      ...shown.map((picture) => {
        const figure = document.createElement("figure");
        const image = new Image();
        image.src = picture.src;
        image.alt = picture.alt;
        const caption = document.createElement("figcaption");
        caption.textContent = picture.dataset.label;
        figure.append(image, caption);
        return figure;
      }),
    );
    dialog.querySelector(".said").textContent = prompt;
    dialog.showModal();
  };
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside the picture
  });

  const opens = (image, open) => {
    image.tabIndex = 0;
    image.setAttribute("role", "button");
    image.addEventListener("click", open);
    image.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open();
    });
  };

  for (const samples of document.querySelectorAll(".samples")) {
    const table = samples.querySelector(".all");
    const pictures = new Map([...table.querySelectorAll("img")].map((image) => [image.dataset.cell, image]));
    const reference = samples.dataset.reference; // family and steps
    const open = (cell) => {
      const prompt = cell.split("/")[2];
      const pair = [...new Set([`${reference}/${prompt}`, cell])].map((name) => pictures.get(name));
      enlarge(pair, samples.querySelectorAll(".line .said")[prompt].textContent);
    };
    for (const [cell, image] of pictures) opens(image, () => open(cell));

    const lines = [...samples.querySelectorAll(".viewer .line")];
    const sliders = [...samples.querySelectorAll(".viewer input")];
    sliders.forEach((slider, family) => {
      const counts = slider.dataset.steps.split(" ");
      const images = lines.map((line) => {
        const image = new Image();
        opens(image, () => open(image.dataset.cell));
        line.append(image);
        return image;
      });
      const show = () => {
        const steps = counts[slider.value];
        slider.nextElementSibling.value = plural(steps);
        slider.setAttribute("aria-valuetext", plural(steps));
        images.forEach((image, prompt) => {
          image.dataset.cell = `${family}/${steps}/${prompt}`;
          const picture = pictures.get(image.dataset.cell);
          image.src = picture.src;
          image.alt = picture.alt;
        });
      };
      slider.addEventListener("input", show);
      show();
    });
    samples.querySelector(".viewer").hidden = false;
    table.open = false;
  }
})();

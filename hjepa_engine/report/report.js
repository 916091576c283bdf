"use strict";
// Copies a command; where the browser does not allow it, a click on the command selects it.
for (const button of document.querySelectorAll(".command button")) {
  if (!navigator.clipboard) break;
  button.hidden = false;
  button.onclick = async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
  };
}

// Shows in a chart's legend the values of its curves at the step that is pointed at.
for (const figure of document.querySelectorAll(".chart")) {
  const plot = figure.querySelector(".plot"), svg = plot.querySelector("svg"), rule = svg.querySelector(".rule");
  const at = figure.querySelector(".at"), values = [...figure.querySelectorAll(".legend b")];
  const newest = values.map((value) => value.textContent);
  const [low, high, left, right, log] = svg.dataset.x.split(" ").map(Number);
  const curves = [...svg.querySelectorAll("[data-points]")].map((path) =>
    path.dataset.points.split(" ").map((point) => point.split(":")),
  );
  const scale = log ? Math.log : Number;
  const pixel = (step) => left + ((scale(step) - scale(low)) / (scale(high) - scale(low))) * (right - left);
  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(pixel(+point[0]) - x) < Math.abs(pixel(+best[0]) - x) ? point : best));

  const show = (event) => {
    const box = plot.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const step = nearest(curves.map((points) => nearest(points, x)), x)[0], target = pixel(+step);
    curves.forEach((points, index) => {
      const [own, value] = nearest(points, target);
      values[index].textContent = ` ${value === "nan" ? "not finite" : value}${own === step ? "" : ` (at ${own})`}`;
    });
    at.textContent = ` at ${svg.dataset.xTitle} ${step}`;
    rule.setAttribute("x1", target);
    rule.setAttribute("x2", target);
    rule.style.visibility = "visible";
  };
  const hide = () => {
    values.forEach((value, index) => (value.textContent = newest[index]));
    at.textContent = "";
    rule.style.visibility = "hidden";
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}

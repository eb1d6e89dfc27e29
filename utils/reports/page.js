"use strict";

// Of the figures of a section, show the one that is chosen. Without scripts all of them are seen.
for (const select of document.querySelectorAll("select")) {
  const choices = select.closest("section").querySelectorAll(".choice");
  const show = () => choices.forEach((choice, place) => { choice.hidden = place !== Number(select.value); });
  select.addEventListener("change", show);
  show();
}

// Values of the points nearest to the mouse. A spot is [x, y, text], its place in fractions of the figure.
const REACH = 14; // pixels between mouse and point
const SAME = 4; // pixels between points that are told together
const MOST = 6;

for (const plot of document.querySelectorAll(".plot")) {
  let spots = null;
  const tip = plot.appendChild(document.createElement("div"));
  const ring = plot.appendChild(document.createElement("div"));
  tip.className = "tip";
  ring.className = "ring";
  const hide = () => { tip.hidden = ring.hidden = true; };
  hide();

  plot.addEventListener("mousemove", (event) => {
    spots ??= JSON.parse(plot.querySelector("script").textContent);
    const box = plot.getBoundingClientRect();
    const distance = ([x, y], [left, top]) => Math.hypot(x * box.width - left, y * box.height - top);
    const mouse = [event.clientX - box.left, event.clientY - box.top];
    const nearest = spots.reduce((a, b) => (a && distance(a, mouse) <= distance(b, mouse) ? a : b), null);
    if (!nearest || distance(nearest, mouse) > REACH) return hide();
    const place = [nearest[0] * box.width, nearest[1] * box.height];
    const together = spots.filter((spot) => distance(spot, place) <= SAME);
    const more = together.length > MOST ? `\n... and ${together.length - MOST} more` : "";
    tip.textContent = together.slice(0, MOST).map((spot) => spot[2]).join("\n") + more;
    tip.hidden = ring.hidden = false;
    ring.style.left = `${place[0]}px`;
    ring.style.top = `${place[1]}px`;
    tip.style.left = `${Math.max(0, Math.min(place[0] + 12, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${place[1] + 12}px`;
  });
  plot.addEventListener("mouseleave", hide);
}

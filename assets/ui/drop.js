// A place where something of the kinds (as DataTransfer.types names them) can be dropped; it shows that it would take it.
export function droppable(place, kinds, take) {
  const carries = (event) => kinds.some((kind) => event.dataTransfer?.types.includes(kind));
  place.addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    place.classList.add("dropping");
  });
  place.addEventListener("dragleave", (event) => place.contains(event.relatedTarget) || place.classList.remove("dropping"));
  place.addEventListener("drop", (event) => {
    place.classList.remove("dropping");
    if (!carries(event)) return;
    event.preventDefault();
    take(event.dataTransfer);
  });
}

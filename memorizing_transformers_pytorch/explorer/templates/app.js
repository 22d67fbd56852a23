// A tab that is closed or left says so, by the name of its session. A stream that is held open would say it too, but a
// browser opens no more than six connections to a server, for all tabs together.
window.addEventListener("pagehide", () => {
  if (props.value) navigator.sendBeacon(`/closed/${props.value}`);
});
window.addEventListener("pageshow", (event) => {
  if (event.persisted) window.location.reload();
});

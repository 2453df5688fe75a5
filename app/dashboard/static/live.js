// Keeps #live as the server shows it now: the page is asked for again, and its part replaced. Nothing moves while the
// page is hidden, or while somebody is about to use what is in it.
const place = document.getElementById("live");

async function refresh() {
  if (document.hidden || place.contains(document.activeElement)) return;
  const answer = await fetch(location.href, {headers: {Accept: "text/html"}, redirect: "manual"});
  if (answer.type === "opaqueredirect") location.reload(); // the session has ended
  if (!answer.ok) return;
  const found = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("live");
  if (found !== null && !place.contains(document.activeElement)) place.replaceChildren(...found.childNodes);
}

async function keepOn() {
  try {
    await refresh();
  } catch {
    // away for a while: the next round asks again
  }
  setTimeout(keepOn, 1000 * Number(place.dataset.every));
}

if (place !== null) setTimeout(keepOn, 1000 * Number(place.dataset.every));

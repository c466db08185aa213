"use strict";
// Keeps the page live: on each event it fetches itself and changes what differs, so that focus, scrolling and what is
// being typed stay. Forms with data-to ask for confirmation and call a JSON route.

const said = document.getElementById("said");
const live = document.getElementById("live");

function same(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && (a.id || "") === (b.id || "");
}

function renew(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType !== Node.ELEMENT_NODE) {
    old.nodeValue = fresh.nodeValue;
    return;
  }
  // What is being typed stays; a form that only has a button changes with what may be done.
  if (old.tagName === "FORM" && old.contains(document.activeElement) && !document.activeElement.matches("button")) return;
  // What the reader has folded or unfolded stays so, until there is another verdict to see.
  if (old.tagName === "DETAILS" && (old.open || old.dataset.verdict === fresh.dataset.verdict)) fresh.open = old.open;
  for (const name of old.getAttributeNames()) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const name of fresh.getAttributeNames()) {
    const value = fresh.getAttribute(name);
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.matches("input, select, textarea")) return;
  const wanted = [...fresh.childNodes];
  wanted.forEach((child, index) => {
    const there = old.childNodes[index];
    if (!there) old.appendChild(child);
    else if (same(there, child)) renew(there, child);
    else there.replaceWith(child);
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

let wanted = false;
let busy = false;

async function refresh() {
  wanted = true;
  if (busy || document.hidden) return;
  busy = true;
  while (wanted && !document.hidden) {
    wanted = false;
    const begun = performance.now();
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (answer.redirected && new URL(answer.url).pathname === "/login") location.reload();
      if (answer.ok) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        renew(document.getElementById("main"), page.getElementById("main"));
        document.title = page.title;
      }
    } catch {
      // The stream of events says that the connection is lost.
    }
    // A large fleet changes all the time: most of it is spent waiting.
    await new Promise((done) => setTimeout(done, Math.max(500, 5 * (performance.now() - begun))));
  }
  busy = false;
}

function listen() {
  if (document.querySelector("input[name=token]")) return;
  const events = new EventSource("/events");
  let first = true;
  live.hidden = false;
  events.addEventListener("open", () => {
    live.textContent = "live";
    live.classList.remove("lost");
  });
  events.addEventListener("changed", (event) => {
    // The first one tells whether something changed while the page was on its way.
    if (!first || event.data !== live.dataset.seen) refresh();
    first = false;
  });
  events.addEventListener("error", () => {
    live.textContent = "connection lost";
    live.classList.add("lost");
    first = false;
  });
  document.addEventListener("visibilitychange", () => {
    if (wanted) refresh();
  });
}

function body(form) {
  const found = {};
  for (const [name, value] of new FormData(form)) {
    found[name] = name === "select" ? Object.fromEntries(value.split(/\s+/).filter(Boolean).map((one) => one.split("="))) : value;
  }
  return found;
}

let question = 0;

function confirmed(text, action) {
  const ask = document.getElementById("ask");
  document.getElementById("ask-text").textContent = text;
  document.getElementById("ask-yes").textContent = action.replace("…", "");
  ask.returnValue = "no";
  ask.showModal();
  const mine = ++question;
  return new Promise((done) =>
    ask.addEventListener("close", function closed() {
      // The event is queued: that of the question before may come while this one stands.
      if (mine === question && ask.open) return;
      ask.removeEventListener("close", closed);
      done(mine === question && ask.returnValue === "yes");
    }),
  );
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.dataset.to) return;
  event.preventDefault();
  // Taken now: the page may change while the question stands.
  const { to, method, then, confirm } = form.dataset;
  const sent = JSON.stringify(body(form));
  if (!(await confirmed(confirm, event.submitter.textContent))) return;
  said.textContent = "…";
  try {
    const answer = await fetch(to, { method, headers: { "Content-Type": "application/json" }, body: sent });
    const told = await answer.json();
    if (!answer.ok) {
      said.textContent = [told.where, told.what, told.remedy].filter(Boolean).join(". ");
      return;
    }
    said.textContent = "Done.";
    const next = then.replace(/\{([^}]+)\}/, (_, path) => path.split(".").reduce((value, key) => value[key], told));
    if (next === location.pathname) refresh();
    else location.assign(next);
  } catch (error) {
    said.textContent = `The controller does not answer: ${error.message}`;
  }
});

listen();

"use strict";
// The server's own description, openapi.json, as a page.

const element = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

const resolve = (schema, all) => (schema.$ref ? all[schema.$ref.split("/").pop()] : schema);

function typeOf(schema, all, depth = 0) {
  const found = resolve(schema, all);
  const choices = found.anyOf ?? found.oneOf;
  if (choices) return [...new Set(choices.map((choice) => typeOf(choice, all, depth)))].join(" | ");
  if (found.const !== undefined) return JSON.stringify(found.const);
  if (found.enum) return found.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (found.type === "array") return `[${typeOf(found.items, all, depth)}, …]`;
  if (found.type === "object" && found.properties && depth < 2)
    return `{${Object.entries(found.properties).map(([name, of]) => `${name}: ${typeOf(of, all, depth + 1)}`).join(", ")}}`;
  return found.type ?? "any";
}

function table(rows) {
  return element("table", {}, element("tbody", {}, ...rows.map((cells) =>
    element("tr", {}, ...cells.map((text) => element("td", { textContent: text }))))));
}

function fields(schema, all) {
  const found = resolve(schema, all);
  const required = new Set(found.required);
  const properties = Object.entries(found.properties ?? {});
  properties.sort(([a], [b]) => required.has(b) - required.has(a));
  return table(properties.map(([name, of]) => {
    const notes = [required.has(name) ? "required" : "", resolve(of, all).description ?? of.description ?? ""];
    return [name, typeOf(of, all), notes.filter(Boolean).join("; ")];
  }));
}

function card(path, method, route, all) {
  const made = element("section", { className: "card" },
    element("h2", { className: "route" }, element("span", { className: "method", textContent: method.toUpperCase() }), path),
    element("p", { textContent: route.description ?? "" }));
  if (route.parameters)
    made.append(element("h3", { textContent: "Parameters" }),
      table(route.parameters.map((p) => [p.name, typeOf(p.schema, all), p.description ?? ""])));
  if (route.requestBody)
    made.append(element("h3", { textContent: "Body" }), fields(route.requestBody.content["application/json"].schema, all));
  made.append(element("h3", { textContent: "Answers" }),
    table(Object.entries(route.responses).map(([status, said]) => [status, said.description ?? ""])));
  return made;
}

(async () => {
  const key = sessionStorage.getItem("gmsa-key");
  const response = await fetch("openapi.json", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (!response.ok) {
    document.getElementById("status").textContent = "Give the API key on the page first, in this tab.";
    return;
  }
  const api = await response.json();
  const cards = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, route]) => card(path, method, route, api.components.schemas)));
  document.getElementById("routes").replaceChildren(...cards);
})();

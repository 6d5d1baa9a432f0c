// The OpenAPI description as a page; the usual viewers load their scripts from elsewhere.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function table(caption, rows) {
  if (!rows.length) return "";
  const body = rows.map(([name, type, text]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, type), element("td", {}, text)));
  return element("table", {}, element("caption", {}, caption), element("tbody", {}, ...body));
}

function resolve(schema, api) {
  return schema?.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema;
}

function typeOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  return schema.type === "array" ? `list of ${typeOf(schema.items) || "numbers"}` : schema.type ?? "";
}

function fields(schema, api) {
  const resolved = resolve(schema?.type === "array" ? schema.items : schema, api);
  return Object.entries(resolved?.properties ?? {}).map(([name, field]) => [name, typeOf(field), field.description ?? ""]);
}

function article(path, method, operation, api) {
  const body = operation.requestBody?.content ?? {};
  const good = operation.responses["200"]?.content ?? {};
  const answer = good["application/json"]?.schema;
  const refusals = Object.entries(operation.responses).filter(([status]) => status !== "200");
  return element(
    "article",
    { class: "card" },
    element("h2", {}, element("span", { class: "method" }, method.toUpperCase()), ` ${path}`),
    element("p", {}, operation.description ?? operation.summary ?? ""),
    table("Parameters", (operation.parameters ?? []).map((p) => [p.name, typeOf(p.schema), p.description ?? `in the ${p.in}`])),
    table("Body", body["application/json"] ? fields(body["application/json"].schema, api) : Object.keys(body).map((type) => [type, "", ""])),
    table("Answer", answer ? fields(answer, api) : Object.keys(good).map((type) => [type, "", ""])),
    table("Errors", refusals.map(([status, response]) => [status, "", response.description])),
  );
}

document.getElementById("example").textContent = `curl --data-binary @part.jpg -H "Content-Type: image/jpeg" "${location.origin}/v1/predict?overlay=1"`;
const api = await (await fetch("openapi.json")).json();
const articles = Object.entries(api.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, operation]) => article(path, method, operation, api)));
document.getElementById("operations").append(...articles);

// Score a picture with ONNX Runtime for Node.js: npm install onnxruntime-node, then node score.mjs MODEL picture.ppm
//
// MODEL is a folder that `fbclip export --bundle B --standalone MODEL` wrote, the picture a binary PPM of its size: nothing
// is resized here. Prints verdict, score and the highest value of the anomaly map.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { InferenceSession, Tensor } from "onnxruntime-node";

function readPpm(path) {
  const bytes = readFileSync(path);
  const header = /^P6\s+(\d+)\s+(\d+)\s+255\s/.exec(bytes.toString("latin1", 0, 64));
  if (!header) throw new Error(`${path} is no binary PPM of 8 bit`);
  const [width, height] = [Number(header[1]), Number(header[2])];
  const pixels = Uint8Array.from(bytes.subarray(header[0].length)); // RGB
  if (pixels.length !== width * height * 3) throw new Error(`${path} is cut off`);
  return { width, height, pixels };
}

// Black, or of one colour: no picture of a part.
function showsNothing(pixels) {
  const channels = [0, 1, 2].map((first) => {
    let [low, high, sum, squares] = [255, 0, 0, 0];
    for (let i = first; i < pixels.length; i += 3) {
      low = Math.min(low, pixels[i]);
      high = Math.max(high, pixels[i]);
      sum += pixels[i];
      squares += pixels[i] ** 2;
    }
    const mean = sum / (pixels.length / 3);
    return { range: high - low, mean, deviation: Math.sqrt(Math.max(0, squares / (pixels.length / 3) - mean ** 2)) };
  });
  return channels.every((c) => c.range <= 1) || channels.every((c) => c.mean < 10 && c.deviation < 1);
}

const [folder, picture] = process.argv.slice(2);
const card = JSON.parse(readFileSync(join(folder, "model.json"), "utf8"));
const { width, height, pixels } = readPpm(picture);
if (card.input !== "uint8-nhwc" || width !== card.width || height !== card.height)
  throw new Error(`${folder} takes ${card.input} of ${card.width}x${card.height} pixels`);
if (card.channel_order === "bgr")
  for (let i = 0; i < pixels.length; i += 3) [pixels[i], pixels[i + 2]] = [pixels[i + 2], pixels[i]];
const session = await InferenceSession.create(join(folder, "model.onnx"), { executionProviders: ["cpu"] });
const results = await session.run({ image: new Tensor("uint8", pixels, [1, height, width, 3]) });
const [score, map] = [results.score.data[0], results.anomaly_map.data];
const isProbability = (value) => value >= -1e-3 && value <= 1.001; // no number is none
if (!isProbability(score) || !map.every(isProbability))
  throw new Error("the model gives no probability: nothing is known of the picture");
const verdict = showsNothing(pixels) ? "unusable" : score < card.threshold ? "good" : "defect";
const highest = map.reduce((a, b) => Math.max(a, b));
console.log(verdict, score.toPrecision(9), highest.toPrecision(9));

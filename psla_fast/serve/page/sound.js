// Sound: what the microphone or a file of the browser's own formats holds -> a WAV file for the server.

const IN_BROWSER = /\.(m4a|mp4|aac|webm|weba|mov|3gp)$/i;

/** Tells whether the browser has to decode a file, as the server may lack its decoder. */
export function needsBrowser(file) {
  return IN_BROWSER.test(file.name) || /^(video\/|audio\/(mp4|aac|webm|x-m4a))/.test(file.type);
}

/** Decodes a blob in the browser: mono, 16-bit WAV at a rate in Hz, the first maxSeconds of it. */
export async function toWav(blob, rate, maxSeconds) {
  const context = new AudioContext();
  let decoded;
  try {
    decoded = await context.decodeAudioData(await blob.arrayBuffer());
  } finally {
    await context.close();
  }
  const length = Math.ceil(Math.min(decoded.duration, maxSeconds + 1) * rate);
  const offline = new OfflineAudioContext(1, Math.max(1, length), rate);
  const source = offline.createBufferSource();
  source.buffer = decoded;
  source.connect(offline.destination);
  source.start();
  return writeWav((await offline.startRendering()).getChannelData(0), rate);
}

function writeWav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, word) => [...word].forEach((char, i) => view.setUint8(at + i, char.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return new Blob([view.buffer], { type: "audio/wav" });
}

/** Records from the microphone until stop() or maxSeconds; onTick gets the seconds and the level in 0 … 1. */
export async function startRecording(maxSeconds, onTick) {
  if (!navigator.mediaDevices || !window.MediaRecorder) {
    throw new Error("Recording needs https, or this page at localhost. Choose a file instead.");
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
  } catch (error) {
    const none = error.name === "NotFoundError";
    throw new Error(none ? "There is no microphone." : "The microphone isn't allowed. Allow it beside the address.");
  }
  const recorder = new MediaRecorder(stream);
  const parts = [];
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  const start = performance.now();
  const timer = setInterval(() => {
    const seconds = (performance.now() - start) / 1000;
    analyser.getFloatTimeDomainData(samples);
    const power = samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length;
    onTick(seconds, Math.max(0, Math.min(1, 1 + Math.log10(power + 1e-12) / 6)));
    if (seconds >= maxSeconds && recorder.state === "recording") recorder.stop();
  }, 100);
  const done = new Promise((resolve) => {
    recorder.ondataavailable = (event) => parts.push(event.data);
    recorder.onstop = () => {
      clearInterval(timer);
      stream.getTracks().forEach((track) => track.stop());
      context.close();
      resolve(new Blob(parts, { type: recorder.mimeType }));
    };
  });
  recorder.start(1000);
  return { done, stop: () => recorder.state === "recording" && recorder.stop() };
}

import { start } from "./chat.js";

start(document, fetch.bind(window), sessionStorage);

// Where data, models and logs lie; another folder for new models.
import { TEXT, api, h, notice, say } from "/ui/floe.js";
import { pathField } from "/ui/path_field.js";
import { line } from "/ui/preferences/page.js";

const quiet = (text, onclick) => h("button", { type: "button", class: "quiet", onclick }, text);

// A long path is broken behind the name of a folder, where it is not too long itself.
const breakable = (path) => path.split(/(?<=[\\/])/).flatMap((part) => [part, h("wbr")]);

export async function draw(place) {
  const folders = await api("GET", "/api/preferences/folders");
  const show = (which) => h("span", { class: "with-button" }, h("code", {}, ...breakable(folders[which])),
    quiet(TEXT.open_folder, () => api("POST", "/api/preferences/folders/show", { which })));
  const [path, known] = pathField("folder", "preference-models-folder", TEXT.keep_models_path);
  place.replaceChildren(line(TEXT.folder_data, show("data")), line(TEXT.folder_models, show("models")),
    line(TEXT.keep_models, path, TEXT.keep_models_about), known, h("div", { class: "model-buttons" }, quiet(TEXT.keep_models_now, keep)),
    line(TEXT.folder_logs, show("logs")));

  async function keep() {
    const { folder } = await api("POST", "/api/models/keep", { folder: path.value });
    notice(say("models_kept", { folder }));
    draw(place);
  }
}

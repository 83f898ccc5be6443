"""The report's page in a browser."""

import shutil

import fake_runs
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax.analysis import plots
from rescalevit_jax.report import command_line

webdriver = pytest.importorskip("selenium.webdriver")

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
  not (DRIVER and BROWSER), reason="needs chromium and chromedriver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  from selenium.webdriver.chrome.service import Service

  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  for flag in (
    "--headless=new",
    "--no-sandbox",  # Containers may lack user namespaces.
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
    f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
  ):
    options.add_argument(flag)
  options.set_capability(
    "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
  )
  driver = webdriver.Chrome(options=options, service=Service(DRIVER))
  # A network request of the page would fail with an error.
  driver.execute_cdp_cmd("Network.enable", {})
  driver.execute_cdp_cmd(
    "Network.emulateNetworkConditions",
    {
      "offline": True,
      "latency": 0,
      "downloadThroughput": 0,
      "uploadThroughput": 0,
    },
  )
  yield driver
  driver.quit()


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("page")


@pytest.fixture
def page(page_folder, tiny_config, browser):
  """Open a report with many columns, published figures and attention maps."""
  runs = page_folder / "runs"
  if not runs.exists():
    best = {"LN": 0.095, "BN": 0.61, "GN": 0.7, "Rescale": 0.0955}
    speeds = {"LN": 900.0, "BN": 1200.0, "GN": 0.0, "Rescale": 95.5}
    for norm in ("LN", "BN", "GN", "Rescale"):
      for seed in (0, 1) if norm == "BN" else (0,):
        config = {"model.norm": norm, "model_name": "ViT-B_32", "seed": seed}
        result = {"best_accuracy": best[norm] + 0.01 * seed}
        result |= {"images_per_second": speeds[norm]}
        fake_runs.write(runs / f"{norm}{seed}", config, result)
    fake_runs.write_with_checkpoint(runs / "digits", tiny_config)
    tiny_config.model.norm = "LN"
    config = config_lib.flatten(tiny_config)
    fake_runs.write(runs / "no checkpoint", config, {})
    fake_runs.write(runs / "<script>alert(1)</script>", {}, None)
    assert command_line.main([str(runs), f"--output={page_folder}"]) == 0
  browser.get_log("browser"), browser.get_log("performance")
  browser.get((page_folder / "report.html").as_uri())
  return browser


def column(page, heading):
  """Return the texts of a column from top to bottom."""
  return page.execute_script(
    """
    const table = document.querySelector("table");
    const i = [...table.tHead.rows[0].cells].findIndex(
      (cell) => cell.innerText.trim().replace(/\\s+/g, " ") === arguments[0]);
    return [...table.tBodies[0].rows].map((r) => r.cells[i].innerText.trim());
    """,
    heading,
  )


def header(page, heading):
  return page.find_element(
    "xpath", f"//th[normalize-space(.)='{heading}']//button"
  )


def sort_marks(page):
  cells = page.find_elements("css selector", "th")
  marks = {
    c.text.replace("\n", " "): c.get_attribute("aria-sort") for c in cells
  }
  return {text: mark for text, mark in marks.items() if mark != "none"}


def test_page_opens_without_errors_or_network(page):
  assert page.get_log("browser") == []
  requests = [
    entry["message"]
    for entry in page.get_log("performance")
    if '"Network.requestWillBeSent"' in entry["message"]
  ]
  assert requests
  assert all(
    '"url":"file://' in request or '"url":"data:' in request
    for request in requests
  )
  assert page.title == "Comparison of runs"
  language = page.find_element("css selector", "html").get_attribute("lang")
  assert language == "en"
  assert "<script>alert(1)</script>: step 300" in (
    page.find_element("css selector", "main").text
  )


def test_numbers_sort_as_numbers(page):
  heading = "best accuracy, %"
  assert column(page, "norm")[:4] == ["LN", "BN", "GN", "Rescale"]
  assert sort_marks(page) == {}
  header(page, heading).click()
  first = column(page, heading)
  assert first == ["9.5", "9.6", "50.0", "50.0", "61.5 ± 0.71", "70.0"]
  assert column(page, "norm")[-2:] == ["BN", "GN"]
  assert sort_marks(page) == {heading: "ascending"}
  header(page, heading).click()
  assert column(page, heading) == first[::-1]
  assert sort_marks(page) == {heading: "descending"}
  header(page, "runs (n)").click()
  assert sort_marks(page) == {"runs (n)": "ascending"}


def test_rows_without_a_value_stay_last(page):
  for _ in range(2):  # The run without images/s comes first.
    header(page, "best accuracy, %").click()
  assert column(page, "images/s")[0] == "–"
  header(page, "images/s").click()
  values = column(page, "images/s")
  assert values == ["95.5", "100.0", "100.0", "900.0", "1200", "–"]
  header(page, "images/s").click()
  assert column(page, "images/s") == [*values[-2::-1], "–"]


def test_differences_sort_with_their_sign(page):
  header(page, "difference, best").click()
  values = column(page, "difference, best")
  assert values[-2:] == ["–", "–"]
  numbers = [float(v.replace("−", "-")) for v in values[:-2]]
  assert numbers == sorted(numbers) and numbers[0] < 0 < numbers[-1]


def test_text_sorts_as_text_from_the_keyboard(page):
  from selenium.webdriver.common.keys import Keys

  page.execute_script("document.activeElement.blur()")
  keys = page.switch_to.active_element
  for _ in range(20):
    keys.send_keys(Keys.TAB)
    keys = page.switch_to.active_element
    if keys.text == "norm":
      break
  keys.send_keys(Keys.ENTER)
  assert column(page, "norm") == ["BN", "GN", "LN", "LN", "Rescale", "Rescale"]
  page.switch_to.active_element.send_keys(Keys.SPACE)
  assert sort_marks(page) == {"norm": "descending"}
  assert column(page, "norm")[0] == "Rescale"


def test_images_have_sizes_and_alt_texts(page):
  svgs = page.find_elements("css selector", "figure [role=img] svg")
  images = page.find_elements("css selector", "figure img")
  assert len(svgs) == 3 and len(images) == 2
  for picture in svgs + images:
    assert picture.size["width"] > 300 and picture.size["height"] > 50
  for image in images:
    assert page.execute_script("return arguments[0].naturalWidth", image) > 300
    assert image.get_attribute("alt")
  for box in page.find_elements("css selector", "figure [role=img]"):
    assert box.get_attribute("aria-label")
  figures = page.find_elements("css selector", "figure")
  captions = page.find_elements("css selector", "figure > figcaption")
  assert len(captions) == len(figures) == 5


def test_norms_have_their_plot_color_in_the_table(page):
  swatches = page.find_elements("css selector", "td .swatch")
  for swatch, norm in zip(swatches, column(page, "norm"), strict=True):
    red, green, blue = bytes.fromhex(plots.norm_color(norm)[1:])
    color = swatch.value_of_css_property("background-color")
    assert color.replace(" ", "").startswith(f"rgba({red},{green},{blue},1")


@pytest.mark.parametrize("width", [1280, 700])
def test_only_the_table_scrolls_horizontally(width, page):
  page.execute_cdp_cmd(
    "Emulation.setDeviceMetricsOverride",
    {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
  )
  wide, table, box = page.execute_script(
    """
    const box = document.querySelector(".scroll");
    return [document.documentElement.scrollWidth,
            box.scrollWidth, box.clientWidth];
    """
  )
  page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
  assert wide <= width
  if width < 1000:
    assert table > box


def test_print_style(page):
  page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
  styles = page.execute_script(
    """
    const style = (what) => getComputedStyle(document.querySelector(what));
    return [style("figure").breakInside, style(".scroll").overflowX,
            style("body").color, style("body").backgroundColor];
    """
  )
  page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
  assert styles[:2] == ["avoid", "visible"]
  assert styles[2:] == ["rgb(27, 27, 27)", "rgb(255, 255, 255)"]

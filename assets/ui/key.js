// Every request of this page, Gradio's as well, carries the key that the start link brought. It is read each time: the
// page may have been opened anew in another tab after the program was started again. No module, and in the head: it has
// to be there before the first request, and modules run in the order in which they arrive.
{
  const plain = window.fetch;
  window.fetch = (target, options) => {
    const request = new Request(target, options);
    if (request.url.startsWith(`${location.origin}/`)) request.headers.set("x-floe-key", localStorage.getItem("floe-key"));
    return plain(request);
  };
}

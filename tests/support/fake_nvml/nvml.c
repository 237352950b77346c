/* A stand-in for NVIDIA's libnvidia-ml.so.1, told by environment variables what to answer.
   FAKE_NVML_CARDS  "name|major.minor|total MiB|free MiB|gen|width|gen max|width max|clock MHz|bus bits" joined by ';'
                    (total "-": the card reports no memory; name "!7": taking the card fails with NVML error 7)
   FAKE_NVML_FAULT  "init:9" nvmlInit fails with that error, "hang" it never returns, "crash" it dereferences null,
                    "late-hang" reading memory never returns, "link-hang" reading the link's counter never returns
   FAKE_NVML_LINK   "kB/s to the card,kB/s from it": what the link's counter shows; not set: the card has none */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int ret;
typedef struct { unsigned long long total, free, used; } memory;
typedef struct { char name[96], cc[16], total[32]; unsigned long long free; unsigned v[4], clock, bus; } card;

static card cards[8];
static unsigned n_cards;

static int fault(const char *what) {
    const char *f = getenv("FAKE_NVML_FAULT");
    return f && strncmp(f, what, strlen(what)) == 0;
}

static void read_cards(void) {
    const char *text = getenv("FAKE_NVML_CARDS");
    char copy[2048], *rest = copy, *row;
    n_cards = 0;
    if (!text) return;
    snprintf(copy, sizeof copy, "%s", text);
    while ((row = strsep(&rest, ";")) && n_cards < 8) {
        card *c = &cards[n_cards];
        memset(c, 0, sizeof *c);
        if (sscanf(row, "%95[^|]|%15[^|]|%31[^|]|%llu|%u|%u|%u|%u|%u|%u", c->name, c->cc, c->total, &c->free, &c->v[0],
                   &c->v[1], &c->v[2], &c->v[3], &c->clock, &c->bus) >= 1) n_cards++;
    }
}

ret nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (fault("hang")) for (;;) pause();
    if (fault("crash")) { volatile int *p = NULL; *p = 1; }
    if (fault("init:")) return atoi(getenv("FAKE_NVML_FAULT") + 5);
    read_cards();
    return 0;
}
ret nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
ret nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(ret r) { static char s[32]; snprintf(s, sizeof s, "fake error %d", r); return s; }
ret nvmlSystemGetDriverVersion(char *out, unsigned n) { snprintf(out, n, "580.95.05"); return 0; }
ret nvmlDeviceGetCount_v2(unsigned *n) { *n = n_cards; return 0; }
ret nvmlDeviceGetHandleByIndex_v2(unsigned i, void **handle) {
    if (i >= n_cards) return 2;
    if (cards[i].name[0] == '!') return atoi(cards[i].name + 1);
    *handle = &cards[i];
    return 0;
}
ret nvmlDeviceGetUUID(card *c, char *out, unsigned n) { snprintf(out, n, "GPU-%ld-fake", (long)(c - cards)); return 0; }
ret nvmlDeviceGetMemoryInfo(card *c, memory *m) {
    if (fault("late-hang")) for (;;) pause();
    if (c->total[0] == '-') return 3;
    m->total = strtoull(c->total, NULL, 10) << 20;
    m->free = c->free << 20;
    m->used = m->total - m->free;
    return 0;
}
ret nvmlDeviceGetName(card *c, char *out, unsigned n) { snprintf(out, n, "%s", c->name); return 0; }
ret nvmlDeviceGetCudaComputeCapability(card *c, int *major, int *minor) {
    return sscanf(c->cc, "%d.%d", major, minor) == 2 ? 0 : 3;
}
ret nvmlDeviceGetCurrPcieLinkGeneration(card *c, unsigned *v) { *v = c->v[0]; return 0; }
ret nvmlDeviceGetCurrPcieLinkWidth(card *c, unsigned *v) { *v = c->v[1]; return 0; }
ret nvmlDeviceGetMaxPcieLinkGeneration(card *c, unsigned *v) { *v = c->v[2]; return 0; }
ret nvmlDeviceGetMaxPcieLinkWidth(card *c, unsigned *v) { *v = c->v[3]; return 0; }
ret nvmlDeviceGetMaxClockInfo(card *c, int kind, unsigned *mhz) { (void)kind; *mhz = c->clock; return c->clock ? 0 : 3; }
ret nvmlDeviceGetPcieThroughput(card *c, int counter, unsigned *kilobytes) {
    const char *f = getenv("FAKE_NVML_LINK");
    unsigned from = 0, to = 0;
    (void)c;
    if (fault("link-hang")) for (;;) pause();
    if (!f || sscanf(f, "%u,%u", &to, &from) != 2) return 3;
    *kilobytes = counter == 0 ? from : to;      /* 0: what the card sends */
    return 0;
}
ret nvmlDeviceGetUtilizationRates(card *c, unsigned *rates) { (void)c; rates[0] = 42; rates[1] = 17; return 0; }
ret nvmlDeviceGetMemoryBusWidth(card *c, unsigned *bits) { *bits = c->bus; return c->bus ? 0 : 3; }

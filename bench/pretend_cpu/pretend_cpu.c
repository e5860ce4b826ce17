/* Makes a process believe that it runs on an i7-13700K: the CPUID instructions of libraries that patch_libraries.py has
 * patched (0F A2 became UD2, 0F 0B) raise SIGILL, and are answered here. Loaded with LD_PRELOAD.
 *
 * PRETEND_CPU: "avx2_vnni" (default: AVX2, FMA and AVX-VNNI; no AVX-512, no AMX), "avx2" (no AVX-VNNI either), "host".
 * Instructions that are hidden still exist: this limits who asks first, as every library that chooses kernels does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { EAX, EBX, ECX, EDX };
#define BIT(n) (1u << (n))

static int is_host, has_vnni, is_installed;
int pretend_cpu_answered; /* how often CPUID was answered; 0: nothing was patched */
static struct sigaction previous;

static void cpuid(uint32_t leaf, uint32_t part, uint32_t r[4]) {
    __asm__ volatile("cpuid" : "=a"(r[EAX]), "=b"(r[EBX]), "=c"(r[ECX]), "=d"(r[EDX]) : "a"(leaf), "c"(part));
}

/* Intel's manual, volume 2A, CPUID: leaf 7 and its part 1. */
static void hide_features(uint32_t part, uint32_t r[4]) {
    if (part == 0) { /* AVX-512 and its extensions; AMX (EDX 22, 24, 25) */
        r[EBX] &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
        r[ECX] &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
        r[EDX] &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
    } else if (part == 1) { /* AVX-VNNI; bf16 and fp16 of AVX-512 and AMX; later extensions of AVX-VNNI, AMX and AVX10 */
        uint32_t host[4];
        cpuid(7, 0, host);
        /* The host's VNNI may be that of AVX-512 (AVX512_VNNI and AVX512VL): code is patched to that encoding. */
        if ((host[ECX] & BIT(11)) && (host[EBX] & BIT(31))) r[EAX] |= BIT(4);
        if (!has_vnni) r[EAX] &= ~BIT(4);
        r[EAX] &= ~(BIT(5) | BIT(21));
        r[EDX] &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19));
    }
}

static void answer(uint32_t leaf, uint32_t part, uint32_t r[4]) {
    static const char vendor[] = "GenuntelineI", name[48] = "13th Gen Intel(R) Core(TM) i7-13700K (pretended)";
    static const uint32_t caches[4][4] = {
        /* type, level and sharing; ways and bytes of a line; sets - 1; flags */
        {0x04000121, (11u << 22) | 63, 63, 0},    /* L1 for data, 48 KiB, 12 ways */
        {0x04000122, (7u << 22) | 63, 63, 0},     /* L1 for instructions, 32 KiB, 8 ways */
        {0x04000143, (15u << 22) | 63, 2047, 0},  /* L2, 2 MiB, 16 ways */
        {0x0401C163, (11u << 22) | 63, 40959, 4}, /* L3, 30 MiB, 12 ways */
    };
    cpuid(leaf, part, r);
    if (is_host) return;
    switch (leaf) {
    case 0: /* libraries choose by vendor, too */
        if (r[EAX] < 0x20) r[EAX] = 0x20;
        memcpy(&r[EBX], vendor, 12);
        break;
    case 1: r[EAX] = 0xB0671; break; /* family 6, model 183, stepping 1 */
    case 4:
        memset(r, 0, 16);
        if (part < 4) memcpy(r, caches[part], 16);
        break;
    case 7: hide_features(part, r); break;
    case 0xd:
        if (part == 0) r[EAX] &= ~(BIT(5) | BIT(6) | BIT(7) | BIT(17) | BIT(18)); /* states of AVX-512 and AMX */
        break;
    /* SGX, processor trace, key locker, hybrid cores, topology, AMX's tiles, AVX10 */
    case 0x12: case 0x14: case 0x19: case 0x1a: case 0x1d: case 0x1e: case 0x1f: case 0x24: memset(r, 0, 16); break;
    case 0x80000000u: r[EAX] = 0x80000008u; break;
    case 0x80000002u: case 0x80000003u: case 0x80000004u: memcpy(r, name + 16 * (leaf - 0x80000002u), 16); break;
    }
}

static void trapped(int number, siginfo_t* info, void* context) {
    greg_t* g = ((ucontext_t*)context)->uc_mcontext.gregs;
    const uint8_t* at = (const uint8_t*)g[REG_RIP];
    (void)number, (void)info;
    if (at[0] == 0x0f && at[1] == 0x0b) {
        uint32_t r[4];
        answer((uint32_t)g[REG_RAX], (uint32_t)g[REG_RCX], r);
        g[REG_RAX] = r[EAX], g[REG_RBX] = r[EBX], g[REG_RCX] = r[ECX], g[REG_RDX] = r[EDX];
        g[REG_RIP] += 2;
        __atomic_fetch_add(&pretend_cpu_answered, 1, __ATOMIC_RELAXED);
        return;
    }
    if (at[0] == 0xc4 && (at[1] & 0x1f) == 2 && (at[2] & 3) == 1 && (at[3] & 0xfc) == 0x50) {
        Dl_info whose;
        int is_file = dladdr(at, &whose);
        fprintf(stderr, "pretend_cpu: VNNI in VEX encoding, which this processor lacks, in %s at %#lx\n",
                is_file ? whose.dli_fname : "code made at run time",
                (unsigned long)at - (is_file ? (unsigned long)whose.dli_fbase : 0));
    }
    is_installed = 0; /* the instruction runs again, for whoever had asked for the signal */
    sigaction(SIGILL, &previous, NULL);
}

/* Python's faulthandler and others would take SIGILL away: what they ask for is kept for other instructions. */
int sigaction(int number, const struct sigaction* act, struct sigaction* old) {
    static int (*real)(int, const struct sigaction*, struct sigaction*);
    if (!real) real = (int (*)(int, const struct sigaction*, struct sigaction*))dlsym(RTLD_NEXT, "sigaction");
    if (number != SIGILL || !is_installed) return real(number, act, old);
    struct sigaction before = previous;
    if (act) previous = *act;
    if (old) *old = before;
    return 0;
}

__sighandler_t signal(int number, __sighandler_t handler) {
    struct sigaction act, old;
    memset(&act, 0, sizeof act);
    act.sa_handler = handler, act.sa_flags = SA_RESTART;
    return sigaction(number, &act, &old) ? SIG_ERR : old.sa_handler;
}

__attribute__((constructor)) static void install(void) {
    const char* kind = getenv("PRETEND_CPU");
    if (!kind) kind = "avx2_vnni";
    is_host = !strcmp(kind, "host"), has_vnni = !strcmp(kind, "avx2_vnni");
    if (!is_host && !has_vnni && strcmp(kind, "avx2")) {
        fprintf(stderr, "pretend_cpu: PRETEND_CPU is %s, expected avx2_vnni, avx2 or host\n", kind);
        _Exit(1);
    }
    struct sigaction act;
    memset(&act, 0, sizeof act);
    act.sa_sigaction = trapped;
    act.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGILL, &act, &previous);
    is_installed = 1;
}

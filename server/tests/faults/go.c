/* Slow disk and wrong clock for a program in Go. It calls no C library for either: a sync is a system call of its own, and the time is read from what
 * the kernel maps into each process (vdso(7)), which the program finds by its auxiliary vector. But it is linked with the C library, whose loader calls us
 * before the program's first instruction. We make that vector point at a clock of ours, and have syncs held up by a process beside this
 * one, which the kernel asks (seccomp_unotify(2)). What is looked for in a vDSO, and how: Go, runtime/vdso_linux.go. */
#define _GNU_SOURCE
#include "orders.h"
#include <elf.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* Go calls the two clocks on stacks, and in threads, that the C library may know nothing of: not even its errno is there. */
static long plain_call(long number, long first, long second) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(first), "S"(second) : "rcx", "r11", "memory");
    return result;
}

static int go_clock_gettime(clockid_t clock, struct timespec *time) {
    long result = plain_call(SYS_clock_gettime, clock, (long)time);
    if (result == 0 && clock == CLOCK_REALTIME)
        time->tv_sec += orders->clock;
    return (int)result;
}

static int go_gettimeofday(struct timeval *time, void *zone) {
    long result = plain_call(SYS_gettimeofday, (long)time, (long)zone);
    if (result == 0 && time)
        time->tv_sec += orders->clock;
    return (int)result;
}

#define NAMES "\0__vdso_clock_gettime\0__vdso_gettimeofday"

/* What Go takes for the kernel's vDSO: as much of a shared object as it reads. All addresses in it are relative to where it is. */
static struct vdso {
    Elf64_Ehdr header;
    Elf64_Phdr parts[2];
    Elf64_Dyn dynamic[5];
    /* The first is nobody's. */
    Elf64_Sym symbols[3];
    Elf64_Verdef version;
    /* Buckets and links, one bucket, three links: all symbols are in one list. */
    Elf64_Word hash[2 + 1 + 3];
    char names[sizeof NAMES];
} vdso = {
    .header = { .e_ident = ELFMAG, .e_phoff = offsetof(struct vdso, parts), .e_phnum = 2 },
    .parts = {
        { .p_type = PT_LOAD },
        { .p_type = PT_DYNAMIC, .p_offset = offsetof(struct vdso, dynamic) },
    },
    .dynamic = {
        { DT_STRTAB, { offsetof(struct vdso, names) } },
        { DT_SYMTAB, { offsetof(struct vdso, symbols) } },
        { DT_HASH, { offsetof(struct vdso, hash) } },
        { DT_VERDEF, { offsetof(struct vdso, version) } },
        { DT_NULL, { 0 } },
    },
    .symbols = {
        { 0 },
        { .st_name = 1, .st_info = ELF64_ST_INFO(STB_GLOBAL, STT_FUNC), .st_shndx = 1 },
        { .st_name = 1 + sizeof "__vdso_clock_gettime", .st_info = ELF64_ST_INFO(STB_GLOBAL, STT_FUNC), .st_shndx = 1 },
    },
    .version = { .vd_version = VER_DEF_CURRENT, .vd_flags = VER_FLG_BASE },
    .hash = { 1, 3, 1, 0, 2, 0 },
    .names = NAMES,
};

static void fail(const char *what) {
    perror(what);
    abort();
}

static void set_clock(char **environment) {
    vdso.symbols[1].st_value = (Elf64_Addr)go_clock_gettime - (Elf64_Addr)&vdso;
    vdso.symbols[2].st_value = (Elf64_Addr)go_gettimeofday - (Elf64_Addr)&vdso;
    while (*environment)
        environment++;
    for (Elf64_auxv_t *entry = (Elf64_auxv_t *)(environment + 1); entry->a_type != AT_NULL; entry++) {
        if (entry->a_type == AT_SYSINFO_EHDR)
            entry->a_un.a_val = (uint64_t)&vdso;
    }
}

/* One of those that hold up syncs: as many can be under way at once as there are of them. */
static void *hold_up(void *listener) {
    for (;;) {
        struct seccomp_notif call;
        memset(&call, 0, sizeof call);
        if (ioctl(*(int *)listener, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0) {
            if (errno == EINTR || errno == ENOENT)
                continue;
            fail("seccomp: waiting for a sync");
        }
        if (orders->slow > 0)
            usleep((useconds_t)orders->slow * 1000);
        struct seccomp_notif_resp go_on = { .id = call.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };
        /* Who called may have been killed meanwhile. */
        ioctl(*(int *)listener, SECCOMP_IOCTL_NOTIF_SEND, &go_on);
    }
    return NULL;
}

static void slow_syncs(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fsync, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fdatasync, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof filter / sizeof *filter, filter };
    /* Go interrupts its own threads by signals: a sync that is held up would begin anew with each. */
    unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        fail("prctl");
    static int listener;
    listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    if (listener < 0)
        fail("seccomp: a filter that asks");
    pid_t program_id = getpid(), id = fork();
    if (id < 0)
        fail("fork");
    if (id > 0) {
        close(listener);
        return;
    }
    /* It is under the same filter, and syncs nothing. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0 || getppid() != program_id)
        _exit(1);
    for (int count = 1; count < 8; count++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, hold_up, &listener) != 0)
            fail("pthread_create");
    }
    hold_up(&listener);
}

void begin_go(char **environment) {
    set_clock(environment);
    slow_syncs();
}

/* The least that can be measured.

   stamp child FILE      append the monotonic time of main() to FILE, then wait to be killed
   stamp start N FILE    posix_spawn N children, wait until each has stamped, print the seconds that took
   stamp crash N FILE    kill one child N times; wait by pidfd, spawn the next; print the median in microseconds,
                         from the kill to the stamp of the replacement
   stamp write SIZE COUNT [FILE]
                         write COUNT lines of SIZE bytes to standard output, one at a time; before that, the
                         monotonic time to FILE */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static pid_t spawn(char *self, char *file)
{
    char *argv[] = {self, "child", file, NULL};
    pid_t pid;
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);
    if (posix_spawn(&pid, self, NULL, &attributes, argv, environ) != 0)
        exit(1);
    return pid;
}

static long stamps(char *file)
{
    struct stat status;
    return stat(file, &status) == 0 ? status.st_size / 32 : 0;
}

static double last_stamp(char *file)
{
    char line[33] = {0};
    int fd = open(file, O_RDONLY);
    if (pread(fd, line, 32, (stamps(file) - 1) * 32) != 32)
        exit(1);
    close(fd);
    return atof(line);
}

static int by_size(const void *a, const void *b)
{
    return *(double *)a < *(double *)b ? -1 : 1;
}

static int write_lines(int size, long count, char *file)
{
    char *line = malloc(size);
    memset(line, 'x', size);
    line[size - 1] = '\n';
    if (file) {
        FILE *began = fopen(file, "w");
        fprintf(began, "%.9f\n", now());
        fclose(began);
    }
    for (; count > 0; count--)
        for (int done = 0; done < size;) {
            int written = write(1, line + done, size - done);
            if (written < 0)
                return 1;
            done += written;
        }
    return 0;
}

int main(int argc, char **argv)
{
    char *file = argv[argc - 1];
    if (argc >= 4 && strcmp(argv[1], "write") == 0)
        return write_lines(atoi(argv[2]), atol(argv[3]), argc > 4 ? argv[4] : NULL);
    if (argc == 3 && strcmp(argv[1], "child") == 0) {
        char line[33];
        int fd = open(file, O_WRONLY | O_CREAT | O_APPEND, 0600);
        snprintf(line, sizeof line, "%-31.9f\n", now());
        if (write(fd, line, 32) != 32)
            return 1;
        close(fd);
        for (;;)
            pause();
    }
    if (argc != 4)
        return 2;
    int count = atoi(argv[2]);
    if (strcmp(argv[1], "start") == 0) {
        pid_t *pids = calloc(count, sizeof *pids);
        double began = now();
        for (int i = 0; i < count; i++)
            pids[i] = spawn(argv[0], file);
        while (stamps(file) < count)
            usleep(200);
        printf("%f\n", last_stamp(file) - began);
        for (int i = 0; i < count; i++)
            kill(pids[i], SIGKILL);
        while (wait(NULL) > 0)
            ;
        return 0;
    }
    double *took = calloc(count, sizeof *took);
    pid_t pid = spawn(argv[0], file);
    for (int i = 0; i < count; i++) {
        while (stamps(file) < i + 1)
            usleep(100);
        int pidfd = syscall(SYS_pidfd_open, pid, 0);
        struct pollfd ended = {pidfd, POLLIN, 0};
        double killed = now();
        kill(pid, SIGKILL);
        poll(&ended, 1, -1);
        waitpid(pid, NULL, 0);
        close(pidfd);
        pid = spawn(argv[0], file);
        while (stamps(file) < i + 2)
            usleep(100);
        took[i] = last_stamp(file) - killed;
    }
    kill(pid, SIGKILL);
    qsort(took, count, sizeof *took, by_size);
    printf("%f\n", took[count / 2] * 1e6);
    return 0;
}

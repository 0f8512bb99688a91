package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// cpuTime is the processor time that has been used so far: by this process, by
// PostgreSQL and by RabbitMQ, wherever they come from on this machine.
type cpuTime struct{ self, postgres, rabbit time.Duration }

// readCPU reads /proc; processes that have ended are not counted.
func readCPU() (c cpuTime) {
	c.self = selfCPU()
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		data, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		text := string(data)
		open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
		name, fields := text[open+1:end], strings.Fields(text[end+1:])
		var user, system int64
		fmt.Sscan(fields[11], &user)
		fmt.Sscan(fields[12], &system)
		used := time.Duration(user+system) * (time.Second / 100) // clock ticks, USER_HZ
		switch {
		case name == "postgres":
			c.postgres += used
		case strings.HasPrefix(name, "beam"):
			c.rabbit += used
		}
	}
	return c
}

// selfCPU is the processor time that this process has used.
func selfCPU() time.Duration {
	var used syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &used) // it cannot fail with these arguments
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// since returns the time used since before, for each of n messages.
func (c cpuTime) since(before cpuTime, n int) string {
	us := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(n) }
	return fmt.Sprintf("CPU µs per message: this process %.1f, PostgreSQL %.1f, RabbitMQ %.1f",
		us(c.self-before.self), us(c.postgres-before.postgres), us(c.rabbit-before.rabbit))
}

package servers

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

//go:embed install.sh
var installScript string

// Install installs Debian packages, as root or through sudo if that asks for no
// password. The services in them are neither started nor enabled. Several callers
// wait for each other. Cancelling ctx ends apt-get.
func Install(ctx context.Context, packages ...string) error {
	byHand := "apt-get install --no-install-recommends " + strings.Join(packages, " ")
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("not installed: %s (on Debian: %s)", strings.Join(packages, ", "), byHand)
	}
	argv := []string{"sh", "-c", installScript, "install"}
	if os.Getuid() != 0 {
		if err := exec.CommandContext(ctx, "sudo", "-n", "true").Run(); err != nil {
			return fmt.Errorf("not installed: %s. Please run: sudo %s", strings.Join(packages, ", "), byHand)
		}
		argv = append([]string{"sudo", "-n"}, argv...)
	}
	cmd := exec.CommandContext(ctx, argv[0], append(argv[1:], packages...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it cleans up
	cmd.WaitDelay = 30 * time.Second
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", byHand, errors.Join(err, ctx.Err()), bytes.TrimSpace(output.Bytes()))
	}
	return nil
}

// searchPath leaves a root's own folders out: the servers' users cannot enter them.
func searchPath() string {
	const system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	if os.Getuid() == 0 {
		return system
	}
	return os.Getenv("PATH") + ":" + system
}

// postgresBin is the folder with the programs of that major version, or of the
// newest if version is "". Debian has them outside the search path.
func postgresBin(version string) (string, error) {
	if version == "" {
		version = "*"
	}
	newest, highest := "", 0
	found, _ := filepath.Glob("/usr/lib/postgresql/" + version + "/bin/initdb")
	for _, path := range found {
		var major int
		if _, err := fmt.Sscanf(path, "/usr/lib/postgresql/%d/", &major); err == nil && major > highest {
			newest, highest = filepath.Dir(path), major
		}
	}
	if newest != "" {
		return newest, nil
	}
	return binOf("initdb")
}

// rabbitBin is the folder with RabbitMQ's own scripts. What Debian has in the
// search path are wrappers that serve only root and the user rabbitmq.
func rabbitBin() (string, error) {
	const debian = "/usr/lib/rabbitmq/bin"
	if _, err := os.Stat(debian + "/rabbitmq-server"); err == nil {
		return debian, nil
	}
	return binOf("rabbitmq-server")
}

func binOf(program string) (string, error) {
	for _, dir := range filepath.SplitList(searchPath()) {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			real, err := filepath.EvalSymlinks(path)
			return filepath.Dir(real), err
		}
	}
	return "", fmt.Errorf("%s: %w", program, exec.ErrNotFound)
}

package servers_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/servers"
	"github.com/txbox/txbox/internal/servers/serverstest"
)

// startVariable makes this program start the server in the folder that it names,
// and exit.
const startVariable = "TXBOX_TEST_START"

func TestMain(m *testing.M) {
	if dir := os.Getenv(startVariable); dir != "" {
		if err := (&servers.Postgres{Dir: dir}).Start(context.Background()); err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type server interface {
	Start(context.Context) error
	Stop(context.Context) error
	Kill() error
	Pause() error
	Resume() error
	Ready(context.Context) error
	URL() string
	Remove(context.Context) error
}

func TestPostgresKeepsItsPromises(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(serverstest.Folder(t), "postgres")
	keepsItsPromises(t, dir, &servers.Postgres{Dir: dir}, "data.half-*/base", rows)
}

func TestRabbitMQKeepsItsPromises(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(serverstest.Folder(t), "rabbitmq")
	broker := &servers.RabbitMQ{Dir: dir}
	keepsItsPromises(t, dir, broker, "data/node", messages)
}

// keepsItsPromises begins with a first start that is killed when a file like early
// exists. A use of the server is work that must be there at the next one.
func keepsItsPromises(t *testing.T, dir string, s server, early string, use func(t *testing.T, url string, want int)) {
	removeAtEnd(t, s)
	first := make(chan error, 1)
	go func() { first <- s.Start(t.Context()) }()
	eventually(t, time.Minute, "the first start gets so far", func() bool {
		found, err := filepath.Glob(filepath.Join(dir, early))
		return err == nil && len(found) > 0
	})
	for failed := false; !failed; {
		must(t, "kill the first start", s.Kill())
		select {
		case err := <-first:
			if failed = true; err == nil {
				t.Log("the first start was faster than its killer")
			}
		case <-time.After(10 * time.Millisecond):
		}
	}

	must(t, "start after a start that was killed", s.Start(t.Context()))
	use(t, s.URL(), 0)
	before := leftovers(t, dir)
	must(t, "start what serves", s.Start(t.Context()))
	if after := leftovers(t, dir); before[0] != after[0] {
		t.Errorf("the second start replaced process %s by %s", before[0], after[0])
	}

	must(t, "pause", s.Pause())
	if s.Ready(t.Context()) == nil {
		t.Error("a paused server answers")
	}
	must(t, "start what is paused", s.Start(t.Context()))
	must(t, "serve after a pause", s.Ready(t.Context()))
	use(t, s.URL(), 1)

	must(t, "kill", s.Kill())
	if err := s.Ready(t.Context()); err == nil || len(leftovers(t, dir)) > 0 {
		t.Errorf("processes %s live on after Kill; ready: %v", leftovers(t, dir), err)
	}
	url := s.URL()
	must(t, "start after a crash", s.Start(t.Context()))
	if s.URL() != url {
		t.Errorf("URL after a crash is %s, was %s", s.URL(), url)
	}
	use(t, s.URL(), 2)

	must(t, "pause before stop", s.Pause())
	began := time.Now()
	must(t, "stop what is paused", s.Stop(t.Context()))
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("Stop took %s: it has killed what it should have stopped", took)
	}
	if left := leftovers(t, dir); len(left) > 0 {
		t.Errorf("processes %s live on after Stop", left)
	}
	must(t, "stop again", s.Stop(t.Context()))
	must(t, "kill what is stopped", s.Kill())
}

// rows finds want rows in a table and adds one.
func rows(t *testing.T, url string, want int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	must(t, "connect", err)
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), "CREATE TABLE IF NOT EXISTS kept (n int)")
	must(t, "create table", err)
	var got int
	must(t, "count", conn.QueryRow(t.Context(), "SELECT count(*) FROM kept").Scan(&got))
	if got != want {
		t.Errorf("%d rows, want %d", got, want)
	}
	_, err = conn.Exec(t.Context(), "INSERT INTO kept VALUES (1)")
	must(t, "insert", err)
}

// messages finds want messages in a queue and adds one.
func messages(t *testing.T, url string, want int) {
	t.Helper()
	conn, err := amqp.Dial(url)
	must(t, "dial", err)
	defer conn.Close()
	ch, err := conn.Channel()
	must(t, "open channel", err)
	must(t, "confirm mode", ch.Confirm(false))
	queue, err := ch.QueueDeclare("kept", true, false, false, false, nil)
	must(t, "declare queue", err)
	if queue.Messages != want {
		t.Errorf("%d messages, want %d", queue.Messages, want)
	}
	confirm, err := ch.PublishWithDeferredConfirmWithContext(t.Context(), "", "kept", true, false,
		amqp.Publishing{DeliveryMode: amqp.Persistent})
	must(t, "publish", err)
	if ok, err := confirm.WaitContext(t.Context()); err != nil || !ok {
		t.Errorf("confirmed: %t, %v", ok, err)
	}
}

func TestRabbitMQCtlReachesItsOwnNode(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	messages(t, broker.URL(), 0)
	output, err := broker.Ctl(t.Context(), "-q", "list_queues", "name", "durable")
	must(t, "list queues", err)
	if !strings.Contains(output, "kept\ttrue") {
		t.Errorf("no queue in %q", output)
	}
	if _, err := broker.Ctl(t.Context(), "no_such_command"); err == nil || !strings.Contains(err.Error(), "no_such_command") {
		t.Errorf("unknown command: %v", err)
	}
	for _, port := range []int{broker.Port, broker.Port + 1, broker.Port + 2} {
		if listensBeyondLoopback(t, port) {
			t.Errorf("port %d is open to other machines", port)
		}
	}
}

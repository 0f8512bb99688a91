package relay_test

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// The relay's user may not write to some exchanges, the default one among them.
// Its password holds what a URL has to encode.
func TestForbiddenExchangesDoNotDisturbTheirNeighbours(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	const user, password = "the relay", "?#@:/% S3cret"
	ctl := func(args ...string) {
		t.Helper()
		_, err := broker.Ctl(testenv.Context(t), args...)
		b.must(err)
	}
	forbidden := testenv.Name(t)
	b.declare(forbidden)
	ctl("add_user", user, password)
	ctl("set_permissions", user, "^$", "^"+b.queue+"$", "^$")
	u, err := url.Parse(broker.URL())
	b.must(err)
	u.User = url.UserPassword(user, password)
	b.amqpURL = u.String()

	messages := b.messages(2000, noKey)
	var good, bad []outbox.Message
	for i := range messages {
		switch i % 100 {
		case 30:
			messages[i].Exchange = forbidden
			bad = append(bad, messages[i])
		case 60:
			messages[i].Exchange, messages[i].RoutingKey = "", forbidden
			bad = append(bad, messages[i])
		default:
			good = append(good, messages[i])
		}
	}
	b.write(messages...)
	r, _ := b.start(brisk)
	b.checkAll(b.drain(b.queue, len(good)), good, inFlight)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", len(bad))
	var told int
	b.must(b.db.QueryRow(testenv.Context(t), "SELECT count(*) FROM "+b.db.Table("outbox_parked")+
		" WHERE reason = 'retry' AND last_error LIKE '%ACCESS_REFUSED%' AND last_error LIKE '%the relay%'").Scan(&told))
	if told != len(bad) {
		t.Errorf("%d of %d parked messages tell why", told, len(bad))
	}
	b.must(r.Ready())
	ctl("set_permissions", user, "^$", ".*", "^$")
	b.eventuallyCount("outbox_parked", 0)
	b.checkAll(b.drain(forbidden, len(bad)), bad, 0)
}

// The message that probes a missing exchange turns out to be one that no exchange
// would take. Others probe it.
func TestProbeThatCanNeverBePublishedDoesNotEndTheProbing(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	_, err := broker.Ctl(testenv.Context(t), "eval", "application:set_env(rabbit, max_message_size, 100000), "+
		"persistent_term:put(max_message_size, 100000).")
	b.must(err)
	b.start(brisk)
	missing := testenv.Name(t)
	lost := b.messages(7, noKey)
	for i := range lost {
		lost[i].Exchange = missing
	}
	lost[1].Payload = make([]byte, 200_000)
	b.write(lost[0])
	b.eventuallyCount("outbox_parked", 1)
	_, err = b.db.Exec(testenv.Context(t), "DELETE FROM "+b.db.Table("outbox_parked")) // or it would stay the probe
	b.must(err)
	b.write(lost[1])
	testenv.Eventually(t, time.Minute, "the big one is dead", func() bool { return b.reasons()["dead"] == 1 })
	b.write(lost[2:]...)
	b.eventuallyCount("outbox", 0)
	b.declare(missing)
	b.checkAll(b.drain(missing, 5), lost[2:], 0)
}

// With topic permissions the broker refuses one routing key of an exchange and takes
// others. Nobody else waits for what it refuses, nor is its neighbour by name blamed.
func TestForbiddenTopicsHoldUpNoOtherMessagesOfTheirExchange(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	topics := testenv.Name(t)
	b.must(b.ch.ExchangeDeclare(topics, "topic", true, false, false, false, nil))
	b.must(b.ch.QueueBind(b.queue, "#", topics, false, nil))
	for _, args := range [][]string{
		{"add_user", "u", "p"}, {"set_permissions", "u", ".*", ".*", ".*"}, {"set_topic_permissions", "u", topics, "^good", ".*"},
	} {
		_, err := broker.Ctl(testenv.Context(t), args...)
		b.must(err)
	}
	b.amqpURL = strings.Replace(broker.URL(), "guest:guest", "u:p", 1)
	messages := b.messages(1000, noKey)
	var good, bad []outbox.Message
	for i := range messages {
		messages[i].Exchange, messages[i].RoutingKey = topics, "good.1"
		switch i % 10 {
		case 3:
			messages[i].RoutingKey = fmt.Sprintf("bad.%d", i%50)
			bad = append(bad, messages[i])
		case 6:
			messages[i].Exchange = topics + "'x"
			bad = append(bad, messages[i])
		default:
			good = append(good, messages[i])
		}
	}
	b.write(messages...)
	b.start(brisk)
	b.checkAll(b.drain(b.queue, len(good)), good, inFlight)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", len(bad))
	var wrong int
	b.must(b.db.QueryRow(testenv.Context(t), "SELECT count(*) FROM "+b.db.Table("outbox_parked")+
		" WHERE routing_key LIKE 'good%' AND exchange = $1", topics).Scan(&wrong))
	if wrong != 0 {
		t.Errorf("%d permitted messages are parked", wrong)
	}
}
